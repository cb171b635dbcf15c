"""The command ``ti-fx zoo`` runs the whole chain over many models and says how far each comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ti_fx.cli import _output as output
from ti_fx.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ti_fx.zoo.results import Result, Run
    from ti_fx.zoo.run import Job

EXAMPLES = """\b
Examples:
  ti-fx zoo bert llama vit --attention eager --attention sdpa
  ti-fx zoo my_models.py --html zoo.html
  ti-fx zoo my_models.py:encoder --until sites
  ti-fx zoo --workers 8 --json zoo.json --resume

Stages: build count capture sites teacher prepare train pack export runtime.

Exit code 0: everything passed; 1: something with attention did not, or a factory's model was not built; 2: bad input.
Model types without softmax attention, and those that can't be built here, are listed apart with their reasons."""

_ATTENTIONS = ("eager", "sdpa")
_STYLES = {"passed": "green", "refused": "yellow", "error": "red", "timed out": "red", "died": "red"}


def zoo(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TYPE|FILE.py[:FACTORY]",
            help="Model types of transformers, or Python files whose functions return (model, example) or "
            "(model, example, other); left out: every model type.",
            show_default=False,
        ),
    ] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="eager or sdpa, for model types; may be repeated. Left out: eager.", metavar="NAME"
        ),
    ] = None,
    until: Annotated[str, typer.Option(help="The last stage to run.", metavar="STAGE")] = "runtime",
    limit: Annotated[float, typer.Option(help="Seconds that one model may take.", metavar="SECONDS")] = 300,
    workers: Annotated[int, typer.Option(help="Models at a time, a process each.", metavar="N")] = 1,
    json: Annotated[
        Path | None, typer.Option(help="Keep results here, written after each model.", metavar="FILE")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="At the end, write a page with all results.", metavar="FILE")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the --json file holds, and don't run that again.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="As --resume, but run again what did not pass.")
    ] = False,
) -> None:
    """Run the whole chain over many models and say how far it comes.

    It goes from capture to ONNX Runtime, and where a model comes no further, the reason is given.
    """
    _check(attention or [], limit, workers)
    if (resume or retry) and json is None:
        raise InputError(f"--{'retry' if retry else 'resume'} needs --json, the file to go on with")
    from ti_fx.zoo.chain import STAGES
    from ti_fx.zoo.models import model_types
    from ti_fx.zoo.results import FAILED, Result, Run
    from ti_fx.zoo.run import jobs, run_all

    if until not in STAGES:
        raise InputError(f"there is no stage {until!r} for --until{did_you_mean(until, STAGES)}")
    work = [job for source in sources or model_types() for job in jobs(source, attention or ["eager"])]
    work = list(dict.fromkeys(work))
    results: dict[Job, Result] = {}
    if json is not None and (resume or retry) and json.exists():
        results = {result.job: result for result in Run.read(json).results}
    left = [job for job in work if job not in results or not results[job].is_enough(until, retry)]
    if len(left) < len(work):
        output.say(f"{len(work) - len(left)} of {len(work)} are in {json} already")
    if json is not None:
        Run.of(results.values()).write(json)  # now, so that a folder we can't write to costs nothing
    try:
        with closing(run_all(left, limit, workers, until)) as outcomes:
            for index, (job, outcome) in enumerate(outcomes, start=1):
                results[job] = Result.of(job, outcome, until)
                if json is not None:
                    Run.of(results.values()).write(json)
                _say_result(results[job], f"{index:{len(str(len(left)))}}/{len(left)}")
    except KeyboardInterrupt:
        kept = (
            "" if json is None else f"; {json} holds {len(results)} results, and --resume goes on from there"
        )
        print(f"ti-fx: stopped{kept}", file=sys.stderr)
        raise
    run = Run.of(results.values())
    _summarise(run)
    if html is not None:
        from ti_fx.zoo.page import write_page

        write_page(run, html)
        output.say(f"wrote {html}")
    unbuilt = [one for one in run.with_verdict("not built") if one.job.file is not None]
    if unbuilt or run.with_verdict(*FAILED):
        raise typer.Exit(1)


def _check(attention: Sequence[str], limit: float, workers: int) -> None:
    for name in attention:
        if name not in _ATTENTIONS:
            raise InputError(f"--attention is {name!r}{did_you_mean(name, _ATTENTIONS)}")
    if not limit > 0:
        raise InputError(f"--limit is {limit:g}; give the seconds that one model may take, such as 300")
    if workers < 1:
        raise InputError(f"--workers is {workers}; give 1 or more")


def _say_result(result: Result, place: str) -> None:
    counted = result.outcome.blocks
    blocks = "" if counted is None else f"  {counted} blocks"
    sites = f": {result.sites}" if result.sites else ""
    output.say(
        f"{place}  {result.verdict:12}  {result.title}  {result.outcome.stage or '–'}{blocks}{sites}  "
        f"{result.seconds:.1f} s{'  ' if result.reason else ''}{result.reason}",
        _STYLES.get(result.verdict, ""),
    )
    sys.stdout.flush()  # into a pipe, too: a run takes hours


def _summarise(run: Run) -> None:
    from ti_fx.zoo.results import FAILED
    from ti_fx.zoo.summary import by_reason, parts

    for part in parts(run):
        left_out = [
            f"{count} {words}"
            for count, words in ((part.without, "without softmax attention"), (part.not_built, "not built"))
            if count
        ]
        output.say("")
        output.say(
            f"{part.title}: {len(part.results)} with attention"
            + (f"; left out: {', '.join(left_out)}" if left_out else "")
        )
        for count in part.stages():
            output.say(f"  {count.stage:8}  {count}")
    for verdict in FAILED:
        _list(verdict, [(one.title, one.reason) for one in run.with_verdict(verdict)])
    for title, verdict in (("without softmax attention", "no attention"), ("not built", "not built")):
        those = [one for one in run.results if one.verdict == verdict]
        _list(title, [(", ".join(names), reason) for reason, names in by_reason(those).items()])


def _list(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if rows:
        output.say("")
        output.say(f"{title}:")
    for names, reason in rows:
        output.say(f"  {names}: {reason}")
