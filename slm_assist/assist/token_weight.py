"""w for each token: somebody's function of what teacher and student say of it and of the schedule's w.

`assist.token_weight="package.module:function"` names `function(info, w) -> w of each token`: `info` is a
`losses.TokenInfo`, whose fields have one entry a token, and `w` the float32 scalar of the update. It is called inside
the loss's tiles, so it sees some tokens at a time, as a flat list, and must treat them one by one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_assist import plugins
from slm_assist.losses import TokenInfo
from slm_assist.losses.common import Weight

KEY = "assist.token_weight"
TokenWeight = Callable[[TokenInfo, jax.Array], jax.Array]


def find(name: str) -> TokenWeight | None:
    """The function that a config names, tried on a few tokens' shapes; None for an empty name.

    Raises:
      UserError: it cannot be found or called so, fails, or does not give one number a token.
    """
    if not name:
        return None
    function = plugins.load(KEY, name)
    plugins.check_parameters(KEY, name, function, "info", "w")

    def weigh(info: TokenInfo, w: jax.Array) -> jax.Array:
        given = plugins.call(KEY, name, function, info, w)
        plugins.check_shape(KEY, name, given, info.loss.shape, "a weight for each token")
        return given.astype(jnp.float32)

    number, count = jax.ShapeDtypeStruct((7,), jnp.float32), jax.ShapeDtypeStruct((7,), jnp.int32)
    model = (number, number, number, count)
    jax.eval_shape(weigh, TokenInfo(*model, *model), jax.ShapeDtypeStruct((), jnp.float32))
    return weigh


def of_update(function: TokenWeight | None, w: jax.Array) -> Weight:
    """What the loss takes in an update with the schedule's `w`."""
    return w if function is None else lambda info: function(info, w)
