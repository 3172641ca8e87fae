"""megaopd train | eval | sample | plan | convert | report | doctor | quickstart: thin."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaopd import __version__
from megaopd.errors import EXIT_INTERNAL, EXIT_STOPPED, EXIT_USER, RunStopped, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, 2 for bad input (one message), 1 for a fault of ours (a traceback), 75
    for a run that stopped as it was asked."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # argparse stops collecting positionals at the first option: overrides may stand anywhere.
    arguments, rest = parser.parse_known_args(argv)
    stray = [word for word in rest if word.startswith("-") or "overrides" not in arguments]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    arguments.argv = argv
    try:
        return arguments.command(arguments) or 0
    except UserError as err:
        return _leave(EXIT_USER, f"megaopd: {err}")
    except RunStopped:
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return _leave(130, "megaopd: interrupted")
    except Exception:
        rank = os.environ.get("RANK", "0")
        trace = traceback.format_exc()
        return _leave(EXIT_INTERNAL, f"megaopd: internal error on rank {rank}\n{trace}")


def _leave(code: int, message: str) -> int:
    """Say the message once in the whole job, and end this rank.

    At once, without cleaning up, where there are peers: they may be waiting in a collective that
    this rank will never join. torchrun ends every rank when the first one has gone, so a rank that
    leaves the word to another one waits for that.
    """
    from megaopd.launch import claim_error, under_torchrun

    alone = not under_torchrun()
    if alone or claim_error():
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(10)
    if alone or os.environ.get("WORLD_SIZE", "1") == "1":
        return code
    sys.stdout.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaopd", description="On-policy distillation of language models on megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"megaopd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_runs, _add_plan, _add_convert, _add_recipe, _add_study, _add_small):
        add(commands)
    return parser


def _add_runs(commands: Any) -> None:
    train = commands.add_parser("train", help="distil or fine-tune as a config says")
    evaluate = commands.add_parser("eval", help="evaluate a student on held-out prompts")
    sample = commands.add_parser("sample", help="write a model's responses to a file")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    sample.add_argument("--prompts", type=int, required=True, help="how many of [data]'s prompts")
    sample.add_argument("--greedy", action="store_true", help="the most probable tokens")
    for command, function in ((train, _train), (evaluate, _eval), (sample, _sample)):
        command.add_argument("--config", type=Path, help="a TOML file; see megaopd/recipes/")
        command.add_argument("--ranks", type=int, help="processes on this machine")
        command.add_argument("--port", type=int, default=0, help="rendezvous port (0: any free)")
        command.add_argument(
            "--restarts", type=int, default=0, help="start all ranks again after one has failed"
        )
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        command.set_defaults(command=function)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="memory, traffic and time of a run, and its layout")
    plan.add_argument("--config", type=Path, help="a TOML file; see megaopd/recipes/")
    plan.add_argument("--gpus", type=int, required=True, help="ranks of the run")
    plan.add_argument("--gpu", default="h100", help="a100, h100, h200 or b200")
    plan.add_argument(
        "--teacher-layout",
        default="",
        metavar="tensor=8,...",
        help="the teacher's own layout on the same ranks; default: the student's",
    )
    plan.add_argument("--no-suggest", dest="suggest", action="store_false", help="only this layout")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.set_defaults(command=_plan)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="Hugging Face <-> Megatron checkpoints")
    ways = convert.add_subparsers(required=True, metavar="DIRECTION")
    for way, source in (("hf-to-megatron", "--hf"), ("megatron-to-hf", "--megatron")):
        one = ways.add_parser(way)
        one.add_argument(source, dest="source", type=Path, required=True, metavar="DIR")
        one.add_argument("--out", type=Path, required=True, metavar="DIR")
        one.add_argument("--tp", type=int, default=1, help="tensor parallel ranks to work with")
        one.add_argument("--pp", type=int, default=1, help="pipeline parallel ranks to work with")
        one.add_argument("--ep", type=int, default=1, help="expert parallel ranks to work with")
        one.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the source's")
        one.set_defaults(command=_convert, way=way)


def _add_recipe(commands: Any) -> None:
    recipe = commands.add_parser("recipe", help="a method on a laptop; --list has them all")
    recipe.add_argument("name", nargs="?", default="", help="of a method, or a .toml file's path")
    recipe.add_argument("--list", dest="all", action="store_true", help="every method in a line")
    recipe.add_argument("--variant", choices=("tiny", "full"), default="tiny")
    recipe.add_argument("--show", action="store_true", help="print the TOML and run nothing")
    recipe.add_argument("--dir", type=Path, default=Path("runs/recipes"))
    recipe.add_argument("--seed", type=int, default=0)
    recipe.add_argument(
        "--stages",
        action="append",
        default=[],
        metavar="section.key=value",
        help="an override of every stage before it that trains or samples",
    )
    recipe.add_argument("overrides", nargs="*", metavar="section.key=value")
    recipe.set_defaults(command=_recipe)


def _add_study(commands: Any) -> None:
    study = commands.add_parser("study", help="many_faces: the paper's questions, on a laptop")
    study.add_argument("name", choices=("many_faces",))
    study.add_argument("--dir", type=Path, default=Path("runs/study"))
    study.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    study.add_argument("--workers", type=int, default=2, help="processes, a seed each at a time")
    study.add_argument("--only", type=int, nargs="+", default=[], help="questions, 1 to 9")
    study.add_argument("--full-grid", action="store_true", help="all factors crossed")
    study.add_argument("--real-model", type=Path, help="a small instruct model, e.g. SmolLM2-135M")
    study.set_defaults(command=_study)


def _add_small(commands: Any) -> None:
    report = commands.add_parser("report", help="write report.html of a run")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(command=_report)
    doctor = commands.add_parser("doctor", help="what is installed and what will be used")
    doctor.set_defaults(command=_doctor)
    quickstart = commands.add_parser("quickstart", help="the whole loop on a toy problem")
    quickstart.add_argument("--dir", type=Path, default=Path("runs/quickstart"))
    quickstart.add_argument("--seed", type=int, default=0)
    quickstart.add_argument(
        "--rollout",
        choices=("embedded", "sglang"),
        default="embedded",
        help="sample inside the ranks, or on an SGLang server that is started for the run",
    )
    quickstart.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the OPD")
    quickstart.set_defaults(command=_quickstart)


def _train(arguments: argparse.Namespace) -> int:
    from megaopd.schema import load_config

    config = load_config(arguments.config, arguments.overrides)
    return _in_ranks(arguments, config, lambda: _run("train", config))


def _eval(arguments: argparse.Namespace) -> int:
    from megaopd.schema import load_config

    config = load_config(arguments.config, arguments.overrides)
    if not config.eval.prompts:
        raise UserError("eval.prompts = 0", expected="a number of held-out prompts to evaluate")
    return _in_ranks(arguments, config, lambda: _run("evaluate", config))


def _sample(arguments: argparse.Namespace) -> int:
    from megaopd.schema import make_config, read_run, sampling_values

    if arguments.prompts < 1:
        raise UserError(f"--prompts {arguments.prompts}", expected="at least 1")
    values = sampling_values(read_run(arguments.config) if arguments.config else {})
    config = make_config(values, arguments.overrides)

    def work() -> int:
        from megaopd import run

        run.sample(config, arguments.out, prompts=arguments.prompts, greedy=arguments.greedy)
        return 0

    return _in_ranks(arguments, config, work)


def _run(what: str, config: Any) -> int:
    from megaopd import run

    getattr(run, what)(config)
    return 0


def _in_ranks(arguments: argparse.Namespace, config: Any, here: Any) -> int:
    """Run `here` if this is a rank already, else start the ranks that the layout needs."""
    from megaopd import stop
    from megaopd.launch import check_restarts, run_ranks, under_torchrun

    if under_torchrun():
        check_restarts()
        stop.listen()
        return here()
    if arguments.restarts < 0:
        raise UserError(f"--restarts {arguments.restarts}", expected="0 or more")
    own, teachers = config.student_ranks, config.teacher_parallel.ranks
    ranks = arguments.ranks or config.ranks
    if ranks <= teachers or (ranks - teachers) % own:
        also = f", and {teachers} for the teacher" if teachers else ""
        raise UserError(f"--ranks {ranks}", expected=f"a multiple of {own}, by the layout{also}")
    return run_ranks(arguments.argv, ranks, port=arguments.port, restarts=arguments.restarts)


def _convert(arguments: argparse.Namespace) -> int:
    from megaopd.launch import run_ranks, under_torchrun
    from megaopd.models.arch import architecture, check_layout, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.models.layout import check_expert_use
    from megaopd.models.sharded import read_manifest
    from megaopd.models.weights import check_new_dir, hf_dtype
    from megaopd.parallel import ParallelConfig, make_grid

    to_megatron = arguments.way == "hf-to-megatron"
    model = ModelConfig(path=str(arguments.source))
    dtype: Any = arguments.dtype or (
        hf_dtype(model.hf_dir) if to_megatron else read_manifest(arguments.source)["dtype"]
    )
    layout = ParallelConfig(
        tensor=arguments.tp, pipeline=arguments.pp, expert=arguments.ep, sequence=arguments.tp > 1
    )
    arch = architecture(read_hf_config(model.hf_dir), where=str(model.hf_dir))
    check_layout(arch, layout, who=str(arguments.source))
    check_expert_use([arch], layout)
    if not under_torchrun():
        check_new_dir(arguments.out)
        return run_ranks(arguments.argv, layout.least_ranks)
    from megaopd.models import convert

    model = ModelConfig(path=str(arguments.source), dtype=dtype)
    grid = make_grid(layout)
    work = convert.hf_to_megatron if to_megatron else convert.megatron_to_hf
    work(model, arguments.out, grid)
    if grid.rank == 0:
        print(f"wrote {arguments.out}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from megaopd.plan.command import plan

    return plan(
        arguments.config,
        arguments.overrides,
        gpus=arguments.gpus,
        gpu=arguments.gpu,
        teacher_layout=arguments.teacher_layout,
        suggest=arguments.suggest,
        as_json=arguments.json,
    )


def _recipe(arguments: argparse.Namespace) -> int:
    from megaopd.study import methods

    if arguments.all:
        from rich.console import Console

        Console().print(methods.table())
        return 0
    if not arguments.name:
        raise UserError("no method", expected="its name", fix="megaopd recipe --list")
    return methods.command(
        arguments.name, arguments.variant, arguments.dir, arguments.seed, arguments.overrides,
        stages=arguments.stages, show=arguments.show,
    )  # fmt: skip


def _study(arguments: argparse.Namespace) -> int:
    from megaopd.study.runner import command

    return command(
        arguments.dir, arguments.seeds, arguments.workers, arguments.only,
        full_grid=arguments.full_grid, real_model=arguments.real_model,
    )  # fmt: skip


def _report(arguments: argparse.Namespace) -> int:
    from megaopd.report.diagnosis import diagnosis
    from megaopd.report.html import write_report
    from megaopd.report.metrics import read_metrics

    path = write_report(arguments.run_dir)
    for line in diagnosis(read_metrics(arguments.run_dir)):
        print(f"- {line}")
    print(f"wrote {path}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from megaopd.doctor import print_report

    print_report()
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from megaopd import quickstart, stop
    from megaopd.launch import run_ranks, under_torchrun

    overrides = [f"rollout.engine={arguments.rollout}", *arguments.overrides]
    if under_torchrun():
        stop.listen()
        quickstart.run(arguments.dir, arguments.seed, overrides)
        return 0
    quickstart.check(arguments.dir, overrides)
    return run_ranks(arguments.argv, quickstart.RANKS)
