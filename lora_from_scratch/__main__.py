"""The one command line of the course: python -m lora_from_scratch."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lora_from_scratch.doctor import check_adapter, examine, gib
from lora_from_scratch.memory import (
    ARCHITECTURES,
    inference_ledger,
    nf4_bits,
    training_ledger,
)
from lora_from_scratch.models import describe

app = typer.Typer(
    help="LoRA from scratch: the command line of the course.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def main() -> None:
    """LoRA from scratch: the command line of the course."""


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument()] = None,
    adapter: Annotated[Path | None, typer.Argument()] = None,
) -> None:
    """Say what this computer can run, or what is wrong with ADAPTER on MODEL.

    Without arguments: the machine; exit status 1 if it cannot run the scale
    that LORA_SCALE asks for. With a MODEL, a scale (tiny, small, full) or the
    folder of a checkpoint, and the folder of an ADAPTER: every fault that
    can be seen in the file, without a change to either; exit status 1 if
    there is one, 2 for a model or a folder that is not there.
    """
    if model is not None:
        _adapter_report(model, adapter)
        return
    try:
        report = examine()
    except ValueError as error:
        Console(stderr=True).print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from error
    console = Console(highlight=False, markup=False)
    console.print(_facts(report))
    console.print(_scales(report))
    for verdict in report.verdicts:
        if verdict.base is describe() and not verdict.runs:
            console.print(
                f"The scale {verdict.scale} does not run here: "
                f"{verdict.reason}. LORA_SCALE=tiny needs the least."
            )
            raise typer.Exit(1)


def _adapter_report(base: str, folder: Path | None) -> None:
    from lora_from_scratch.serving.command import load_model

    try:
        if folder is None:
            raise ValueError("give the folder of an adapter after the model")
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        findings = check_adapter(load_model(base)[0], folder)
    except (ValueError, RuntimeError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    for found in findings:
        typer.echo(f"{found.fault}: {found.measured}")
        typer.echo(f"  cause: {found.cause}\n  cure: {found.cure}")
    if findings:
        raise typer.Exit(1)
    typer.echo(f"no fault found in {folder.name} on {base}")


@app.command()
def memory(
    model: str,
    r: int = 8,
    targets: str = "all-linear",
    batch: int = 1,
    tokens: int | None = None,
    checkpointing: bool = False,
    inference: bool = False,
) -> None:
    """Say what a training step of MODEL holds in memory, with AdamW.

    TARGETS are name endings, with commas between them. TOKENS are 1,024, or
    as many as the model has positions. With --inference, say what generating
    TOKENS needs instead. Exit status 2 for a model or a setting that cannot
    be counted.
    """
    lora = dict(r=r, target_modules=targets, checkpointing=checkpointing)
    if targets != "all-linear":
        lora["target_modules"] = targets.split(",")
    try:
        if model not in ARCHITECTURES:
            raise ValueError(
                f"model must be one of {', '.join(ARCHITECTURES)}, "
                f"got {model!r}"
            )
        a = ARCHITECTURES[model]
        if tokens is None:
            tokens = min(1024, a.n_positions or 1024)
        setting, nf4 = (batch, tokens), nf4_bits()
        full = dict(recipe="bf16", checkpointing=checkpointing)
        columns = {
            "full, bf16": training_ledger(a, *setting, **full),
            "LoRA, bf16": training_ledger(
                a, *setting, **lora, bits_per_parameter=16
            ),
            "QLoRA, NF4": training_ledger(
                a, *setting, **lora, bits_per_parameter=nf4
            ),
        }
        if inference:
            columns = {
                "bf16": inference_ledger(a, *setting, 16),
                "NF4": inference_ledger(a, *setting, nf4),
            }
    except ValueError as error:
        Console(stderr=True).print(str(error), highlight=False, markup=False)
        raise typer.Exit(2) from error
    console = Console(highlight=False, markup=False)
    console.print(_ledgers(columns, f"{model}, {batch} x {tokens} tokens, GB"))


@app.command()
def serve(
    base: str,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="May be given many times."),
    ] = None,
    host: str = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0 takes a free one.")
    ] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LORA_SERVE_TOKEN",
            help="What clients send as API key. The variable is safer: "
            "others see your command line.",
        ),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        typer.Option(help="Folder from which clients may load adapters."),
    ] = None,
    max_adapters: Annotated[
        int, typer.Option(min=1, help="Adapters in one batch.")
    ] = 8,
    max_rank: Annotated[int, typer.Option(min=1)] = 16,
    max_rows: Annotated[
        int, typer.Option(min=1, help="Rows of one batch.")
    ] = 16,
) -> None:
    """Serve BASE and its adapters over HTTP, as OpenAI's clients expect it.

    BASE is a scale (tiny, small, full) or the folder of a checkpoint. Other
    machines are let in only with a token. Exit status 2 for a model, an
    adapter or an address that cannot be served.
    """
    from lora_from_scratch.serving import command

    console = Console(stderr=True, highlight=False)
    token = token or None
    try:
        bound = command.bind(host, port, token)
        served = command.prepare(
            base,
            adapter or [],
            token,
            adapter_root,
            console,
            max_adapters=max_adapters,
            max_rank=max_rank,
            max_rows=max_rows,
        )
    except (ValueError, RuntimeError) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    bound.listen()
    address, port = bound.getsockname()[:2]
    if ":" in address:
        address = f"[{address}]"
    console.print(
        f"serving {base} on http://{address}:{port}/v1, ctrl-C stops",
        soft_wrap=True,
        markup=False,
    )
    command.run(served, bound)


@app.command()
def train(
    config: Path,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; beside CONFIG if not given."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check everything, train nothing.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the adapter at the end.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --serve.")
    ] = 8000,
) -> None:
    """Make an adapter from the data that CONFIG names, and ask it questions.

    Checks, searches, trains, evaluates, exports and tries the result on a
    server. The same command goes on with a run that was stopped or killed.
    Exit status 2 for settings or data that cannot be used, 1 for a run that
    stopped and can go on.
    """
    from lora_from_scratch.pipeline import run as pipeline
    from lora_from_scratch.pipeline import smoke
    from lora_from_scratch.serving import command

    console = Console(stderr=True, highlight=False, markup=False)
    try:
        if check:
            pipeline.check(config)
            console.print("nothing is wrong with it")
            return
        bound = command.bind("127.0.0.1", port, None) if serve else None
        name = pipeline.read_settings(config).name
        out = out or config.parent / name
        done = pipeline.run(
            config, out, lambda line: console.print(line, soft_wrap=True)
        )
        app = (
            smoke.prepare(
                pipeline.read_settings(config).base,
                name,
                out / "adapter",
                done.setting["r"],
            )
            if serve
            else None
        )
    except ValueError as error:
        console.print(str(error), soft_wrap=True)
        raise typer.Exit(2) from error
    except RuntimeError as error:
        console.print(str(error), soft_wrap=True)
        raise typer.Exit(1) from error
    found = done.result["accuracy"]
    console.print(
        f"accuracy {found['mean']:.3f} [{found['low']:.3f}, "
        f"{found['high']:.3f}] on {done.result['n']} test rows; everything "
        f"is in {out}",
        soft_wrap=True,
    )
    if serve:
        bound.listen()
        console.print(
            f"serving {name} on http://127.0.0.1:{bound.getsockname()[1]}/v1, "
            "ctrl-C stops",
            soft_wrap=True,
        )
        command.run(app, bound)


def _ledgers(columns, title) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("item", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for items in columns.values():
        items["total"] = sum(items.values())
    for item in next(iter(columns.values())):
        sizes = [items[item] for items in columns.values()]
        if any(sizes):
            table.add_row(item, *(f"{size / 1e9:.3f}" for size in sizes))
    return table


def _facts(report) -> Table:
    total, available = report.memory_bytes
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("system", report.system)
    for line in report.devices:
        table.add_row("device", line)
    table.add_row("threads", f"{report.threads} (OMP_NUM_THREADS changes it)")
    table.add_row("memory", f"{gib(total)}, {gib(available)} available")
    table.add_row("disk", f"{gib(report.disk_bytes)} free for the cache")
    table.add_row("cache", f"{report.cache} (small)")
    table.add_row("", f"{report.hub} (full)")
    for name, value in report.settings.items():
        table.add_row("set", f"{name}={value}")
    for name, version in report.versions.items():
        table.add_row("package", f"{name} {version}")
    return table


def _scales(report) -> Table:
    table = Table(title="What runs here", title_justify="left")
    table.add_column("scale", no_wrap=True)
    table.add_column("base model", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    for verdict in report.verdicts:
        table.add_row(
            verdict.scale,
            verdict.base.name.split("/")[-1],
            f"{verdict.base.parameters:,}",
            "yes" if verdict.runs else "no",
            verdict.reason,
        )
    return table


if __name__ == "__main__":
    app(prog_name="python -m lora_from_scratch")
