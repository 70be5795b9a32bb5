"""Where rows of the log go: lines, a bar, JSON lines, a table, TensorBoard, Weights & Biases, MLflow, your own.

`Sink` says what a sink is; ``lt.log(folder, to=[...])`` takes any number of them.
"""

from .bar import Bar
from .csv_table import CSV
from .event_files import TensorBoard
from .json_lines import JsonLines
from .lines import Lines
from .mlflow_run import MLflow
from .rows import FACTS, Row, Sink
from .wandb_run import WandB

__all__ = ["CSV", "FACTS", "Bar", "JsonLines", "Lines", "MLflow", "Row", "Sink", "TensorBoard", "WandB"]
