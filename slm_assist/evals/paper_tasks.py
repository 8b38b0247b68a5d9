"""The 28 tasks of the paper (2410.18779), as far as the EleutherAI harness has them: `--tasks paper28`.

The harness's prompts, splits and answer forms are its own, so figures compare between runs that it evaluated, not with
the paper's. The metrics are those nearest to the paper's; its shots are one, and three for MBPP.
"""

from collections.abc import Container, Mapping
from typing import NamedTuple

GROUP = "paper28"


class PaperTask(NamedTuple):
    """One task of the paper.

    Attributes:
      paper: its name in the paper.
      task: its name in the harness; "" where the harness lacks it.
      metric: the figure to report, as the harness calls it: "METRIC,FILTER".
      shots: examples before each question.
      note: how the harness's form differs, or what there is instead.
      unsafe: scoring runs code that the model wrote.
      scale: makes the harness's figure a share, as the others are.
    """

    paper: str
    task: str
    metric: str = "acc,none"
    shots: int = 1
    note: str = ""
    unsafe: bool = False
    scale: float = 1.0


TASKS = (
    PaperTask("NQ-Open", "nq_open", "exact_match,remove_whitespace"),
    PaperTask("TriviaQA", "triviaqa", "exact_match,remove_whitespace", note="without its documents (rc.nocontext)"),
    PaperTask("TyDiQA no-context (en)", "", note="the harness has TyDiQA's gold passage form only (tydiqa_goldp)"),
    PaperTask("WebQuestions", "webqs", "exact_match,none", note="an answer counts if greedy decoding gives it"),
    PaperTask("RACE-M", "", note="the harness has RACE's high-school half only (race)"),
    PaperTask("RACE-H", "race", note="its example too is from the test split, the only one there is"),
    PaperTask("SQuADv2", "squadv2", "best_exact,none", note="with the best threshold on P(unanswerable)", scale=0.01),
    PaperTask("TyDiQA gold passage (en)", "tydiqa_goldp_en", "exact_match,none"),
    PaperTask("ARC-E", "arc_easy"),
    PaperTask("ARC-C", "arc_challenge"),
    PaperTask("HellaSwag", "hellaswag", "acc_norm,none"),
    PaperTask("OpenBookQA", "openbookqa"),
    PaperTask("PIQA", "piqa"),
    PaperTask(
        "StoryCloze",
        "",
        note="its data are had from their authors only; with them storycloze_2016 or storycloze_2018, from a task file",
    ),
    PaperTask("WinoGrande", "winogrande"),
    PaperTask("BoolQ", "boolq"),
    PaperTask("CB", "cb"),
    PaperTask("COPA", "copa"),
    PaperTask("MultiRC", "multirc", note="accuracy over answers"),
    PaperTask("RTE", "sglue_rte", note="SuperGLUE's (rte is GLUE's)"),
    PaperTask("ReCoRD", "record", "em,none", note="its scorer needs a transformers before release 5"),
    PaperTask("WiC", "wic"),
    PaperTask("WSC", "wsc"),
    PaperTask("XLSum (en)", "", note="the harness has other languages only; it takes a task file with Rouge-2"),
    PaperTask("XSum", "", note="xsum needs the package unitxt, which has prompts and shots of its own"),
    PaperTask("WikiLingua (en)", "", note="the harness does not have it; it takes a task file with Rouge-2"),
    PaperTask("LAMBADA", "lambada_openai", note="OpenAI's detokenised test split, which the example is from too"),
    PaperTask("MBPP", "mbpp", "pass_at_1,none", shots=3, unsafe=True),
)


def choose(available: Container[str], *, run_code: bool) -> tuple[list[PaperTask], dict[str, str]]:
    """The tasks that can be run, and why the others cannot, by the paper's name.

    Args:
      available: the names of the tasks that the installed harness has.
      run_code: code that the model wrote may be run.
    """
    chosen: list[PaperTask] = []
    left_out: dict[str, str] = {}
    for entry in TASKS:
        if not entry.task:
            left_out[entry.paper] = entry.note
        elif entry.task not in available:
            left_out[entry.paper] = f"the installed harness has no {entry.task}"
        elif entry.unsafe and not run_code:
            left_out[entry.paper] = f"{entry.task} runs code that the model wrote; allow it with --run_code"
        else:
            chosen.append(entry)
    return chosen, left_out


def mean(figures: Mapping[str, float]) -> float:
    """The mean of the tasks' figures."""
    return sum(figures.values()) / len(figures)
