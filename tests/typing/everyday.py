"""What an everyday training writes: type-checked, never run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import looptools as lt


def step(model: nn.Module, batch: tuple[Tensor, Tensor], state: lt.State) -> dict[str, Tensor]:
    return {"loss": model(batch[0]).mean(), "logits": batch[1]}


def tokens(state: lt.State) -> Tensor:
    count: Tensor = (state.batch[1] >= 0).sum()
    return count


def error_rate(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) != labels).float().mean()


class Newest:
    row: Mapping[str, Any]

    def write(self, row: lt.sinks.Row, state: lt.State) -> None:
        self.row = row

    def close(self) -> None:
        pass


def main() -> None:
    seed: int = lt.seed_everything(1, deterministic=True)
    model, batches = nn.Linear(2, 2), [(torch.ones(4, 2), torch.zeros(4))]
    groups = lt.param_groups(model, lr=0.1, weight_decay=0.05, lr_multipliers={"weight": 0.1})
    adam, sgd = torch.optim.AdamW(groups), torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = AveragedModel(model)
    phase: lt.Phase = (
        lt.train(model, batches, step, autocast="bfloat16")
        | lt.freeze("bias", until=lt.epochs(1))
        | lt.nan_guard(skip=3)
        | lt.schedule_lr(adam, [lt.schedules.one_cycle(), lt.schedules.cosine()], warmup=lt.epochs(1))
        | lt.schedule_momentum(adam, lt.schedules.one_cycle_momentum())
        | lt.schedule(adam, "weight_decay", lambda done, total, base: base)
        | lt.backward(adam, accumulate=4, across_epochs=True, weigh=tokens)
        | lt.unused_params(model)
        | lt.grad_noise(model.parameters())
        | lt.watch(model, every=lt.epochs(1), histograms=True)
        | lt.clip_grad_value(model.parameters(), 1.0)
        | lt.clip_grad_norm(model.parameters(), 1.0, norm_type=float("inf"))
        | lt.update(adam)
        | lt.ema(averaged)
        | lt.swa(averaged, start=lt.epochs(3))
    )
    other: lt.Phase = lt.train(model, batches, step) | lt.optimize([adam, sgd]) | lt.update_by_closure(sgd)
    val = lt.validate(averaged, batches, step) | lt.measure(
        {"error": error_rate}, lambda state: (state.outputs, state.batch[1])
    )
    run: lt.Run = (
        lt.workflow([(phase, lt.iterations(500)), (other, 1), (val, 1)], max_epochs=5)
        | lt.leak_guard()
        | lt.timer()
        | lt.memory()
        | lt.profile(Path("runs"))
        | lt.log("runs", csv=True, to=[Newest(), lt.sinks.WandB("project")], hparams={"seed": seed})
        | lt.checkpoint("runs", best=[lt.highest("val/error", top=3), lt.lowest("val/loss")])
        | lt.early_stop(lt.lowest("val/loss"), patience=3)
        | lt.stop_after(lt.target("val/error", at_most=0.1))
    )
    means: dict[str, float] = run.validate(val)
    suggestion: float | None = lt.lr_find(run).suggestion
    print(means, suggestion, lt.plot([run, "runs"], ["loss"], path="curves.png"))
