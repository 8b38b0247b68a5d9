"""A model of ours for the EleutherAI harness: `lm_eval`'s model class "slm_assist".

For the same weights it answers request by request as the harness's own `hf` model does with a causal model: the same
split of context and continuation, the same cuts from the left, windows, prefix tokens and stop strings. Two things
differ. A text that spells a special token is encoded as a text, but for one BOS at its beginning. And where `hf` stops
at an assertion (a continuation without tokens or beyond `max_length`, no room to generate) a line says what to do.

    lm = SlmAssistLM("runs/salt")
    lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from slm_assist import pretrained as pretrained_lib
from slm_assist import sharding
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError
from slm_assist.evals.continuations import Continuations, mesh_of
from slm_assist.experiment import compute_dtype
from slm_assist.models.hf import load as hub
from slm_assist.pretrained import Loaded
from slm_assist.run_dir import RunDir

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"evaluating needs the EleutherAI harness ({error}): pip install 'slm_assist[eval]'") from error

__all__ = ["SlmAssistLM", "TaskManager", "context_length", "evaluate", "text_prefix"]

DEFAULT_LENGTH = 2048  # where nothing says what a model takes, as in the harness
DEFAULT_ROWS = 16
# Options of generation that change nothing at these values; others that we do not know are errors.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "num_return_sequences": 1}


@register_model("slm_assist")
class SlmAssistLM(TemplateLM):
    """A loaded model, or the name of one, for the harness.

    Args:
      pretrained: what `slm_assist.pretrained.load` takes, or what it gives.
      step, mesh, say: as for `load`; the mesh is by default all devices, with the batch split over them.
      dtype: "auto" (bfloat16 where the device has it natively), "float32" or "bfloat16".
      max_length: tokens that the model reads at most; 0: what it was trained with, as far as that is known.
      batch_size: rows in a batch, over all devices.
      add_bos_token: whether texts begin with BOS; None: as the model was trained (`text_prefix`).
      prefix_token_id: stands before a text without a context; None: BOS, or else EOS, as the model's folder names them.
      max_batch_size, device: what the harness passes to every model; not used.

    Raises:
      UserError: there is no such model, or an option does not fit it.
    """

    def __init__(
        self,
        pretrained: str | Loaded,
        *,
        step: int = -1,
        dtype: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        say: Callable[[str], None] = print,
        max_length: int = 0,
        batch_size: int | str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if isinstance(pretrained, str):
            mesh = mesh or sharding.make_mesh()
            chosen = compute_dtype(dtype, mesh.devices.flat[0])
            pretrained = pretrained_lib.load(pretrained, step=step, dtype=chosen, mesh=mesh, trim=False, say=say)
        self.loaded = pretrained
        self.vocabulary: Vocabulary = pretrained.vocabulary
        most = pretrained.model.config.max_positions  # 0: rotary positions have no end
        self.max_length = int(max_length) or min(length for length in (context_length(pretrained.name), most) if length)
        if 0 < most < self.max_length:
            raise UserError(
                f"max_length={max_length}: {pretrained.name} has {most} learned positions; use at most that"
            )
        rows = int(batch_size) if str(batch_size).isdecimal() else DEFAULT_ROWS
        self._continuations = Continuations(pretrained.model, pretrained.params, max_length=self.max_length, rows=rows)
        self._prefix = text_prefix(pretrained, add_bos_token)
        pieces = self.vocabulary.pieces()
        said = [pieces.index(name) for name in _ends(pretrained.name) if name in pieces]
        candidates = (prefix_token_id, *said, *self._prefix, self.vocabulary.bos_id, self.vocabulary.eos_id)
        self._prefix_token = next((i for i in candidates if i is not None), None)
        self._prefix_text = None if self._prefix_token is None else pieces[self._prefix_token]
        self._eos_text = None if self.eot_token_id is None else pieces[self.eot_token_id]
        self._generator: Any = None

    @property
    def batch_size(self) -> int:
        return self._continuations.rows

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """(padded length, scored tokens) of the programs that were compiled for log-likelihoods."""
        return self._continuations.shapes

    @property
    def eot_token_id(self) -> int | None:
        return self.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token is None:
            raise UserError(
                f"{self.loaded.name}: its vocabulary has neither BOS nor EOS to put before a text without a context; "
                "give prefix_token_id"
            )
        return self._prefix_token

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return f"slm_assist-{self.vocabulary.fingerprint}"

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a text, behind BOS where texts begin so; one that spells it at its beginning has no second one."""
        if add_special_tokens is None and self._prefix_text and string.startswith(self._prefix_text):
            ids = [self.prefix_token_id, *self.vocabulary.encode(string.removeprefix(self._prefix_text))]
        else:
            ids = [*(self._prefix if add_special_tokens is not False else ()), *self.vocabulary.encode(string)]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.vocabulary.decode(tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        for (text, _, continuation), _ in zip(requests, pairs, strict=True):
            if not continuation:
                raise UserError(
                    f"a continuation has no tokens of its own: {text[1]!r} after {text[0][-40:]!r}; change the task, "
                    "as by target_delimiter"
                )
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm) as bar:
            scored = [tuple(score) for score in self._continuations.score(pairs, bar.update)]
        for (text, _, _), score in zip(requests, scored, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, score)
        return scored

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in nats; one longer than `max_length` in windows that predict every token once."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(log_prob for log_prob, _ in itertools.islice(scores, count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its stop strings, EOS or its greatest length."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for members in groups.values():
                prompts = {index: self.tok_encode(requests[index].args[0]) for index in members}
                members.sort(key=lambda index: (-len(prompts[index]), prompts[index]))
                for part in _batched(members, self.batch_size):
                    kwargs = requests[part[0]].args[1]
                    found = self._generate([prompts[index] for index in part], kwargs, seed=part[0])
                    for index, text in zip(part, found, strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(part))
        return texts

    def _generate(self, prompts: list[list[int]], gen_kwargs: dict[str, Any], seed: int) -> list[str]:
        from slm_assist.decode.generate import Generator

        options = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        stop = [text for text in handle_stop_sequences(options.pop("until"), eos=self._eos_text) if text]
        most = options.pop("max_gen_toks")
        room = self.max_length - most
        if room <= 0:
            raise UserError(
                f"max_length={self.max_length}: a task generates up to {most} tokens, which leaves none to read; use a "
                "larger max_length"
            )
        if self._generator is None:
            self._generator = Generator(
                self.loaded.model,
                self.loaded.params,
                self.vocabulary,
                mesh=mesh_of(self.loaded.params),
                max_rows=self.batch_size,
                stop_ids=self.loaded.stop_ids,
            )
        prompts = [prompt[-room:] or [self.prefix_token_id] for prompt in prompts]
        sampling = _sampling(gen_kwargs, options)
        ids = self._generator.generate_ids(prompts, max_tokens=most, sampling=sampling, stop=stop, seed=seed)
        return [postprocess_generated_text(self.tok_decode(row), stop, None) for row in ids]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "model": self.loaded.name,
            "model_step": self.loaded.step,
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(self.loaded.params)),
            "model_dtype": str(jax.numpy.dtype(self.loaded.model.dtype)),
            "max_length": self.max_length,
            "text_prefix": self._prefix,
            "compiled_shapes": sorted(self.shapes),
        }


def _sampling(gen_kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
    """What the options of a request say about sampling; top_k is 50 where it is not given, as in transformers.

    Raises:
      UserError: one of them is not supported.
    """
    from slm_assist.decode.generate import Sampling

    sampled = options.pop("do_sample", False)
    temperature = float(options.pop("temperature", 0.0))
    top_k, top_p = options.pop("top_k", None), options.pop("top_p", None)
    for name, value in options.items():
        if name not in NEUTRAL or value != NEUTRAL[name]:
            known = "until, max_gen_toks, do_sample, temperature, top_k, top_p"
            raise UserError(f"generation_kwargs.{name}={value!r} of a task is not supported; there are {known}")
    if not sampled:
        return Sampling()
    if "temperature" not in gen_kwargs:
        temperature = 1.0
    return Sampling(temperature, 50 if top_k is None else int(top_k), 1.0 if top_p is None else float(top_p))


def text_prefix(loaded: Loaded, bos: bool | None = None) -> list[int]:
    """The ids that texts begin with: BOS or nothing, unless a tokenizer.json adds something else.

    Rows of a run that was trained here begin documents with BOS where the vocabulary has it. A model that came from
    elsewhere reads what its tokenizer.json puts before a text (`hf` does as it says); what that puts behind is left
    out, as it would stand between a context and its continuation.

    Raises:
      UserError: `bos` is asked for and the vocabulary has none.
    """
    own = [] if loaded.vocabulary.bos_id is None else [loaded.vocabulary.bos_id]
    if bos is False:
        return []
    if bos is None and not RunDir(loaded.name).metrics.is_file():
        own = _framing(loaded, own)
    if bos and not own:
        raise UserError(f"{loaded.name}: texts cannot begin with BOS (--bos=yes), its vocabulary has none")
    return own


def _file(name: str, file: str) -> Path:
    """A file of a model that is a run or a folder of Hugging Face's."""
    return (hub.folder(name, weights=False) if hub.is_name(name) else RunDir(name).path) / file


def _framing(loaded: Loaded, otherwise: list[int]) -> list[int]:
    """What the model's tokenizer.json puts before a text; `otherwise` where there is none."""
    file = _file(loaded.name, "tokenizer.json")  # an exported one says more than the vocabulary that it was made of
    if not file.is_file() and loaded.vocabulary.file_name != file.name:
        return otherwise
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(file.read_text("utf-8") if file.is_file() else loaded.vocabulary.model.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    framed = tokenizer.encode("a")
    added = itertools.takewhile(lambda pair: pair[1], zip(framed.ids, framed.special_tokens_mask, strict=True))
    return [i for i, _ in added]


def _ends(name: str) -> list[str]:
    """BOS and EOS as a folder of Hugging Face's calls them, those that it has."""
    try:
        facts = json.loads(_file(name, "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    tokens = (facts.get(key) for key in ("bos_token", "eos_token"))
    contents = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return [content for content in contents if content]


def context_length(name: str) -> int:
    """The tokens that a model was made to read: `data.seq_len` of a run, or what a model's config.json says."""
    if hub.is_name(name):
        return pretrained_lib.HubModel(name).max_positions or DEFAULT_LENGTH
    return pretrained_lib.RunModel(name).max_positions or DEFAULT_LENGTH


def _batched(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
