"""The inner optimizer's moments at a sync: kept, pulled back or set to zero, on a noisy quadratic.

Fifty directions with curvatures 1, 1/2, ... 1/50 and a minimum that moves at random with each gradient. Every form is
tuned: the best of 29 learning rates for each length of training. With the PyTorch front end.
"""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure

from common import BARE, FAST, SLOW, command, markdown
from lookahead_optim.torch import Lookahead

PERIOD, SLOW_STEP_SIZE = 6, 0.5
DIRECTIONS = 50
# Which moments are pulled back or set to zero, in Adam and in heavy ball.
FORMS = {
    "Adam": {
        "kept": ("kept", ()),
        "first pulled back": ("pulled", ("exp_avg",)),
        "both pulled back": ("pulled", ("exp_avg", "exp_avg_sq")),
        "first set to 0": ("zero", ("exp_avg",)),
        "both set to 0": ("zero", ("exp_avg", "exp_avg_sq")),
        "both and the step count set to 0": ("zero", ("exp_avg", "exp_avg_sq", "step")),
    },
    "heavy ball": {
        "kept": ("kept", ()),
        "pulled back": ("pulled", ("momentum_buffer",)),
        "set to 0": ("zero", ("momentum_buffer",)),
    },
}


def at_sync(how, names):
    """Return a step post hook that changes the inner optimizer's moments after each sync."""

    def hook(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        if how == "kept" or group["lookahead_step"] % group["sync_period"]:
            return
        for parameter in group["params"]:
            entries = optimizer.state[parameter]
            for name in names:
                if how == "zero":
                    entries[name].zero_()
                else:
                    at_last_sync = entries.setdefault(f"{name}_at_sync", torch.zeros_like(entries[name]))
                    at_last_sync.lerp_(entries[name], group["slow_step_size"])
                    entries[name].copy_(at_last_sync)

    return hook


def loss_at_the_end(inner, form, rate, steps, replicas):
    """Return the mean loss of the slow weights after the syncs in the last tenth of a training."""
    torch.manual_seed(0)
    curvatures = 1 / torch.arange(1, DIRECTIONS + 1)
    weights = torch.nn.Parameter(torch.full((replicas, DIRECTIONS), 3.0))
    optimizer = torch.optim.Adam([weights], rate) if inner == "Adam" else torch.optim.SGD([weights], rate, momentum=0.9)
    optimizer = Lookahead(optimizer, PERIOD, SLOW_STEP_SIZE)
    optimizer.register_step_post_hook(at_sync(*FORMS[inner][form]))
    losses = []
    for step in range(1, steps + 1):
        weights.grad = curvatures * (weights.detach() - torch.randn(replicas, DIRECTIONS))
        optimizer.step()
        if step > 0.9 * steps and step % PERIOD == 0:
            losses.append(float((curvatures * weights.detach().square()).sum(1).mean()) / 2)
    return float(np.mean(losses))


def run(quick):
    """Return the results of the experiment: for each form and length the losses of all learning rates."""
    lengths, replicas, count = ([60], 20, 8) if quick else ([300, 1500], 200, 29)
    results = []
    for inner, forms in FORMS.items():
        for steps in lengths:
            # Both need lower learning rates in longer trainings. No form's best rate is the first or last.
            highest = (120 if inner == "Adam" else 300) / steps
            rates = np.geomspace(highest / 128, highest, count)
            for form in forms:
                losses = [loss_at_the_end(inner, form, float(rate), steps, replicas) for rate in rates]
                finite = [round(loss, 6) if np.isfinite(loss) and loss < 1e6 else None for loss in losses]
                results.append(
                    {"inner": inner, "form": form, "steps": steps, "rates": rates.tolist(), "losses": finite}
                )
    return results


def best(one):
    """Return the lowest loss of a form and its learning rate."""
    return min((loss, rate) for loss, rate in zip(one["losses"], one["rates"]) if loss is not None)


def tables(results):
    """Return the table of the experiment's page."""
    lengths = sorted({one["steps"] for one in results})
    rows = []
    for inner, forms in FORMS.items():
        for form in forms:
            found = {one["steps"]: best(one) for one in results if (one["inner"], one["form"]) == (inner, form)}
            cells = [cell for steps in lengths for cell in (f"{found[steps][0]:.4f}", f"{found[steps][1]:.3f}")]
            rows.append([f"{inner}, {form}", *cells])
    heading = [cell for steps in lengths for cell in (f"loss after {steps} steps", "learning rate")]
    return {"best": markdown(["", *heading], rows)}


def plots(results):
    """Return the losses over learning rates after the longer training."""
    steps = max(one["steps"] for one in results)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, inner in zip(figure.subplots(1, 2), FORMS):
        found = [one for one in results if (one["inner"], one["steps"]) == (inner, steps)]
        for one, color in zip(found, (SLOW, FAST, "#009E73", BARE, "#CC79A7", "0.4")):
            losses = [np.nan if loss is None else loss for loss in one["losses"]]
            axes.loglog(one["rates"], losses, ".-", color=color, linewidth=1, markersize=4, label=one["form"])
        axes.set(xlabel="inner learning rate", ylabel="loss", title=f"{inner}, {steps} steps: lower is better")
        axes.legend(fontsize=7)
    return {"losses": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "torch", "numpy"])
