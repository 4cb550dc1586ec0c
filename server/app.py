"""The Flower ServerApp: all of it is in fedslm, which is installed at the server."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedslm.flower import serve_flower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation that the run config describes."""
    serve_flower(grid, context.run_config, context.run_id)
