"""The Flower server of this project; `flwr run . -c 'config="simulations/demo.toml"'` starts it."""

from pathlib import Path

from fedpeft.engines.flower_server import server_app

app = server_app(Path(__file__).resolve().parent.parent)
