"""`slm-assist generate`: text from a model, streamed as it comes."""

import argparse
import json
import sys
from pathlib import Path

from slm_assist.commands.common import Command, number, refuse
from slm_assist.errors import UserError, one_of

EXAMPLES = r"""slm-assist generate runs/salt --prompt 'def main(' --temperature 0.8 --top_p 0.95
slm-assist generate runs/salt --prompts questions.jsonl --max_tokens 256 --temperature 0 --stop $'\n\n' --json
head -n 3 stories.txt | slm-assist generate hf:EleutherAI/pythia-160m --prompts - --samples 4 --seed 7"""
NOTE = """\
New text goes to stdout, the speed to stderr. Without a prompt the text begins as a document does."""
DTYPES = ("auto", "float32", "bfloat16")


def add(command: Command) -> None:
    """Adds the subcommand."""
    sub = command("generate", run, "continue texts with a model", EXAMPLES, NOTE)
    sub.add_argument("model", help="a run directory or hf:PATH_OR_NAME")
    given = sub.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    given.add_argument(
        "--prompts",
        metavar="FILE",
        help="texts to continue, one a line; in a .jsonl each line an object with the field prompt; -: stdin",
    )
    sub.add_argument("--max_tokens", type=number(int), default=128, help="most new tokens of a text (default 128)")
    sub.add_argument(
        "--temperature", type=number(float), default=0.8, help="divides logits; 0: the likeliest token (0.8)"
    )
    sub.add_argument("--top_k", type=number(int), default=0, help="draw among the k likeliest tokens; 0: all")
    sub.add_argument("--top_p", type=number(float), default=1.0, help="draw among the likeliest of this probability")
    sub.add_argument("--stop", action="append", default=[], metavar="STR", help="end before this string; repeatable")
    sub.add_argument("--seed", type=number(int), default=0, help="of what is drawn")
    sub.add_argument("--samples", type=number(int), default=1, help="texts for each prompt")
    sub.add_argument("--step", type=number(int), default=-1, help="one of the run's saved steps; by default the newest")
    sub.add_argument("--dtype", default="auto", help="auto | float32 | bfloat16; auto: what the device multiplies best")
    sub.add_argument("--json", action="store_true", help="print a line of JSON for each text: prompt, text")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Loads the model, prints what it writes, and returns the exit status."""
    refuse(overrides, "generate")
    one_of("--dtype", options.dtype, DTYPES)
    if options.samples < 1:
        raise UserError(f"--samples={options.samples}: use at least 1")
    prompts = [options.prompt or ""] if options.prompts is None else read_prompts(options.prompts)
    prompts = [prompt for prompt in prompts for _ in range(options.samples)]

    import jax

    from slm_assist import pretrained, sharding
    from slm_assist.decode import Generator, Sampling
    from slm_assist.experiment import compute_dtype

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    sampling.check()
    mesh = sharding.make_mesh(data=min(len(prompts), len(jax.devices())))
    dtype = compute_dtype(options.dtype, mesh.devices.flat[0])
    loaded = pretrained.load(options.model, step=options.step, dtype=dtype, mesh=mesh, say=_aside)
    generator = Generator(loaded.model, loaded.params, loaded.vocabulary, stop_ids=loaded.stop_ids)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without UTF-8 gets '?' instead of a traceback
        sys.stdout.reconfigure(errors="replace")
    streams = len(prompts) == 1 and not options.json
    texts = generator.generate(
        prompts,
        max_tokens=options.max_tokens,
        sampling=sampling,
        stop=options.stop,
        seed=options.seed,
        on_text=(lambda _, piece: print(piece, end="", flush=True)) if streams else None,
    )
    if streams:
        print(flush=True)
    for n, (prompt, text) in enumerate([] if streams else zip(prompts, texts, strict=True)):
        title = f"=== prompt {n // options.samples + 1}, sample {n % options.samples + 1}: {prompt!r}"
        print(json.dumps({"prompt": prompt, "text": text}) if options.json else f"{title}\n{text}\n", flush=True)
    _aside(generator.speed.describe())
    return 0


def _aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_prompts(name: str) -> list[str]:
    """The prompts of a file, `-` for stdin: its lines that are not empty, or `prompt` of each object in a .jsonl.

    Raises:
      UserError: it cannot be read, or has no prompts.
    """
    try:
        text = sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompts={name}: {error.strerror or error}; give a file, or - for stdin") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts={name}: not UTF-8 text; convert it") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if name.endswith(".jsonl"):
        prompts = [_field(name, number, line) for number, line in lines]
    else:
        prompts = [line.removesuffix("\r") for _, line in lines]
    if not prompts:
        raise UserError(f"--prompts={name}: no prompts in it; write one a line")
    return prompts


def _field(name: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'{name}, line {number}: write an object with a text called prompt, as {{"prompt": "Once"}}')
    return prompt
