"""Optax: training step time of a transformer in bfloat16, divided by the time with the bare optimizer."""

import jax
import jax.numpy as jnp
import optax

from lookahead_optim.optax import lookahead
from on_device.jax_steps import PERIOD, measure_steps
from programs import of_optax


def cases(device):
    """Return the cases, functions without arguments by name."""
    sizes = {"layers": 8, "width": 512, "length": 512, "rows": 16, "tokens": 16384}
    if device == "cpu":
        sizes = {"layers": 1, "width": 16, "length": 8, "rows": 2, "tokens": 32}
    return {"transformer, AdamW": lambda: training(sizes, device)}


def training(sizes, device):
    """Return times of training steps."""
    with_lookahead = lookahead(optax.adamw(1e-3), PERIOD)
    made = {
        "bare": of_optax._with_updates(optax.adamw(1e-3)),
        "lookahead-optim": of_optax._with_updates(with_lookahead),
        "lookahead-optim, apply_gradients": of_optax._with_apply_gradients(with_lookahead),
        "bare, again": of_optax._with_updates(optax.adamw(1e-3)),
    }
    tokens = jax.random.randint(jax.random.key(0), (sizes["rows"], sizes["length"] + 1), 0, sizes["tokens"])
    programs = {}
    for name, (step, init, to_params) in made.items():

        def train(state, tokens, step=step):
            params, state = state
            return step(params, state, jax.grad(loss)(params, tokens))

        params = to_params(initial(**sizes))
        state = params, init(params)
        programs[name] = jax.jit(train, donate_argnums=0).lower(state, tokens).compile(), state, tokens
        del params, state
    return measure_steps(programs, cycles=3 if device == "cpu" else 34)


def initial(layers, width, tokens, length, rows):
    """Return float32 parameters of a decoder."""
    keys = iter(jax.random.split(jax.random.key(1), 2 + 4 * layers))

    def weight(*shape):
        return jax.random.normal(next(keys), shape) / shape[0] ** 0.5

    return {
        "embedding": weight(tokens, width),
        "positions": weight(length, width),
        "layers": [
            {
                "qkv": weight(width, 3 * width),
                "out": weight(width, width),
                "up": weight(width, 4 * width),
                "down": weight(4 * width, width),
                "scales": jnp.ones((2, width)),
            }
            for _ in range(layers)
        ],
    }


def loss(params, tokens):
    """Return the mean loss of predicting the next token, with a forward pass in bfloat16."""
    params = jax.tree.map(lambda param: param.astype(jnp.bfloat16), params)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = params["embedding"][inputs] + params["positions"]

    def normalized(x, scale):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale

    heads = max(1, x.shape[-1] // 64)
    for layer in params["layers"]:
        q, k, v = jnp.split(normalized(x, layer["scales"][0]) @ layer["qkv"], 3, axis=-1)
        q, k, v = (one.reshape(*one.shape[:2], heads, -1) for one in (q, k, v))
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(normalized(x, layer["scales"][1]) @ layer["up"]) @ layer["down"]
    logits = (x @ params["embedding"].T).astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
