"""`python -m throughline.zoo train NAME` and `python -m throughline.zoo check`."""

from pathlib import Path

import torch
import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def train(
    name: str,
    workdir: Path = typer.Option(Path("runs/zoo"), help="where checkpoints and the finished model go"),
    steps: int = typer.Option(0, help="0: as many as the recipe says"),
    threads: int = typer.Option(0, help="0: all cores"),
) -> None:
    """Train one zoo model by its recipe; continues where an earlier call stopped."""
    from throughline.zoo.training import train

    if threads:
        torch.set_num_threads(threads)
    folder = train(name, workdir / name, lambda line: print(line, flush=True), steps or None)
    print(f"written to {folder}")


@app.command()
def check(prompts: int = typer.Option(500, help="held-out prompts per template")) -> None:
    """Examine the bundled models on held-out problems; exits with 1 if one is below its mark."""
    from throughline.zoo.training import check_all

    if not check_all(prompts, print):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
