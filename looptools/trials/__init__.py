"""Runs tried in processes of their own: saved at hostile places, resumed, and compared bit for bit."""
