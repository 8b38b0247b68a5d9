"""A teacher that is somebody's function instead of a small LM of ours: `assist.teacher="package.module:function"`.

    function(tokens_BxT) -> (hidden_BxTxE, head)

`head` is a matrix [E, V], or a function of one tile's hidden [N, E] (then of floats or integers) that gives logits
[N, V], so that no array [B, T, V] exists. A parameter called `batch` receives the arrays of the batch (`tokens`,
`targets`, `segment_ids`, `positions`, `mask`, each [B, T]): of `targets`, position t may use those before t only, or
what is learnt is of no use. A parameter called `params` receives the arrays that

    function.prepare(rows, vocabulary) -> a tree of numpy arrays

made of the training rows (`data.row_store.Rows`, whose `all_ids` gives every id) before the run: they are whole on
every device and arguments of the compiled step, not part of it.
"""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slm_assist import plugins, sharding
from slm_assist.errors import UserError
from slm_assist.losses.common import Head

KEY = "assist.teacher"
OPTIONAL = ("batch", "params")  # parameters that are given by name


def is_own(role: str, name: str) -> bool:
    """Whether what a config names for a role is a function rather than a run directory."""
    return role == "teacher" and plugins.is_plugin(name) and "/" not in name


@dataclasses.dataclass(frozen=True)
class OwnTeacher:
    """Stands where a `helpers.Helper` stands, and for its model too. Made by `find`."""

    run: str  # "package.module:function"
    function: Callable[..., tuple[jax.Array, Head]]
    takes: tuple[str, ...]  # of OPTIONAL
    vocab_size: int
    entries: int  # of the tables, as `bytes` and `identity`
    size: int
    identity: str
    tables: Any  # numpy arrays; None once they are on the devices
    role: str = "teacher"
    step: int = -1
    config: None = None  # no ModelConfig

    @property
    def model(self) -> "OwnTeacher":
        return self

    def num_params(self) -> int:
        """Entries of its tables."""
        return self.entries

    def bytes(self) -> int:
        """Size of its tables."""
        return self.size

    def facts(self) -> dict[str, Any]:
        """What config.json and the report say about it; what making the tables cost is not known."""
        return {
            "run": self.run,
            "step": self.step,
            "parameters": self.entries,
            "train_flops": 0.0,
            "bytes": self.size,
            "identity": self.identity,
        }

    def where(self, mesh: Mesh) -> str:
        """Its memory, for people."""
        return f"{self.size / 1e6:,.1f} MB on every device"

    def same(self, other: Any) -> bool:
        """Whether both are one function."""
        return isinstance(other, OwnTeacher) and self.run == other.run

    def load(self, mesh: Mesh, say: Callable[[str], None] = print) -> tuple["OwnTeacher", Any]:
        """Itself without its tables, and the tables on the devices, whole on each."""
        whole = sharding.replicated(mesh)
        params = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, lambda at: x[at]), self.tables)
        say(f"the FLOPs of {self.run} are not counted")
        return dataclasses.replace(self, tables=None), params

    def answer(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Head]:
        """Hidden states [B, T, E] and head for a batch.

        Raises:
          UserError: the function fails, or what it gives has another shape.
        """
        tokens = batch["tokens"]
        result = plugins.call(KEY, self.run, self._ask, params, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            self._refuse(f"gave {type(result).__name__}; return a tuple (hidden [B, T, E], head)")
        hidden, head = result
        found = getattr(hidden, "shape", None)
        if found is None or len(found) != 3 or found[:2] != tokens.shape:
            self._refuse(f"gave hidden of shape {found}; return [B, T, E], here {(*tokens.shape, 'E')}")
        width = found[2]
        if not callable(head):
            shape, floats = getattr(head, "shape", None), jnp.issubdtype(hidden.dtype, jnp.floating)
            if shape != (width, self.vocab_size) or not floats:
                wanted = f"[E, V] of floats, here {(width, self.vocab_size)}, or a function of hidden [N, E]"
                self._refuse(f"gave a head of shape {shape} for {hidden.dtype} hidden; return {wanted}")
            return hidden, jnp.asarray(head)
        flat = jax.ShapeDtypeStruct((tokens.size, width), hidden.dtype)
        logits = plugins.call(KEY, self.run, jax.eval_shape, head, flat)
        what = f"from the head, of hidden {flat.shape}, logits [N, V]"
        plugins.check_shape(KEY, self.run, logits, (tokens.size, self.vocab_size), what)
        like = {name: (x.shape, x.dtype) for name, x in batch.items()}
        return hidden, jax.tree_util.Partial(partial(self._head_again, like), params)

    def _head_again(self, like: dict[str, tuple], params: Any, hidden_NxE: jax.Array) -> jax.Array:
        """The head's logits where a device computes its tiles: there only `params` is at hand, so it is asked for anew.

        The batch is one of zeros, which no head depends on (`find` has seen to that), and XLA leaves it out.
        """
        batch = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in like.items()}
        return self._ask(params, batch)[1](hidden_NxE)

    def _ask(self, params: Any, batch: Mapping[str, jax.Array]) -> Any:
        given = {"batch": batch, "params": params}
        return self.function(batch["tokens"], **{name: given[name] for name in self.takes})

    def _refuse_head_of_batch(self, params: Any, batch: Mapping[str, Any]) -> None:
        """Raises `UserError` where a head that is a function reads the batch: a tile does not know its place in it."""
        given = jax.eval_shape(lambda params, batch: self.answer(params, batch)[0], params, batch)

        def logits(batch: Any, params: Any, hidden_NxE: jax.Array) -> jax.Array:
            head = self._ask(params, batch)[1]
            return head(hidden_NxE) if callable(head) else hidden_NxE

        flat = jax.ShapeDtypeStruct((given.shape[0] * given.shape[1], given.shape[2]), given.dtype)
        jaxpr = jax.make_jaxpr(logits)(batch, params, flat).jaxpr
        reads = set(jaxpr.invars[: len(batch)])
        for equation in jaxpr.eqns:
            if any(not hasattr(x, "val") and x in reads for x in equation.invars):
                reads.update(equation.outvars)
        if any(not hasattr(x, "val") and x in reads for x in jaxpr.outvars):
            self._refuse("its head reads the batch, of which a tile sees some tokens only; put that into hidden")

    def _refuse(self, problem: str) -> None:
        raise UserError(f"{KEY}={self.run!r}: {problem}")


def check(name: str, step: int = -1) -> Callable[..., Any]:
    """The function that a config names, as far as it can be judged without data.

    Raises:
      UserError: it cannot be found, does not take what it is called with, or has a step.
    """
    function = plugins.load(KEY, name)
    if step != -1:
        raise UserError(f"assist.teacher_step={step}: {name} is a function and has no steps; leave it out")
    takes = _takes(function)
    plugins.check_parameters(KEY, name, function, "tokens", **{name: name for name in takes})
    prepare = getattr(function, "prepare", None)
    if (prepare is None) == ("params" in takes):
        has = "has no .prepare that makes them" if prepare is None else "has a .prepare but no parameter for its arrays"
        raise UserError(f"{KEY}={name!r}: `params` and .prepare go together, and it {has}; give it both or neither")
    if prepare is not None:
        plugins.check_parameters(KEY, f"{name}.prepare", prepare, "rows", "vocabulary")
    return function


def find(name: str, rows: Any, vocabulary: Any, step: int = -1) -> OwnTeacher:
    """The teacher with its tables, made now from `rows`; tried on the shapes of a batch.

    Args:
      rows: the `Rows` to train on, or a stream, which no tables can be made of.
      vocabulary: the student's.

    Raises:
      UserError: as of `check`; `prepare` fails or its tables cannot go on a device; what the function gives has
        another shape than it must.
    """
    function, tables = check(name, step), None
    if hasattr(function, "prepare"):
        if not hasattr(rows, "all_ids"):
            raise UserError(f"{KEY}={name!r}: .prepare needs prepared rows, not a stream: set data.stream=false")
        tables = _checked(name, plugins.call(KEY, f"{name}.prepare", function.prepare, rows, vocabulary))
    leaves = jax.tree.leaves(tables)
    found = OwnTeacher(
        run=name,
        function=function,
        takes=_takes(function),
        vocab_size=vocabulary.size,
        entries=sum(x.size for x in leaves),
        size=sum(x.nbytes for x in leaves),
        identity=_identity(name, tables),
        tables=tables,
    )
    tokens = jax.ShapeDtypeStruct((2, rows.seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), tokens)
    batch["mask"] = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    found._refuse_head_of_batch(tables, batch)
    return found


def _takes(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
    return tuple(name for name in OPTIONAL if name in parameters)


def _named(tables: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path) or "the array", x) for path, x in jax.tree_util.tree_leaves_with_path(tables)]


def _checked(name: str, tables: Any) -> Any:
    """The tables in dtypes that devices hold, all values unchanged but for float64's last digits."""
    for place, x in _named(tables):
        x = np.asarray(x)
        problem = ""
        if x.dtype.kind not in "biuf":
            problem = f"is of dtype {x.dtype}; make it numbers"
        elif x.dtype.kind == "f" and not np.isfinite(x).all():
            problem = f"has {int((~np.isfinite(x)).sum()):,} of {x.size:,} values that are not finite; mend the table"
        elif x.dtype.kind in "iu" and not np.array_equal(x.astype(_on_device(x)), x):
            problem = f"has values beyond {_on_device(x)}; make them smaller, or two tables"
        if problem:
            raise UserError(f"{KEY}={name!r}: of what .prepare gave, {place} {problem}")
    return jax.tree.map(lambda x: np.asarray(x).astype(_on_device(np.asarray(x))), tables)


def _on_device(x: np.ndarray) -> np.dtype:
    return jax.dtypes.canonicalize_dtype(x.dtype)


def _identity(name: str, tables: Any) -> str:
    digest = hashlib.blake2b(name.encode(), digest_size=16)
    for place, x in _named(tables):
        digest.update(f"{place} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
