"""The outer step on lists of PyTorch tensors: the new slow weights, and the restart of the fast weights."""

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lookahead_optim._pieces_torch import Piece, is_large_on_gpu, is_wide

__all__ = [
    "OuterStep",
    "ask_is_large",
    "form_pseudo_gradients",
    "is_large",
    "outer_step",
    "outer_step_reduced",
    "outer_step_unshared",
]


class OuterStep(NamedTuple):
    """The settings of an outer step."""

    slow_step_size: float
    slow_momentum: float = 0.0
    slow_nesterov: bool = True


def outer_step(pieces: list[Piece], steps: list[OuterStep], is_careful: bool) -> bool:
    """Make the outer step of all pieces: move the slow weights, then restart all fast weights from the slow weights.

    With slow momentum b, its factor mu and the slow step size eta, each weight makes this step:

        s = slow - fast
        b = mu * b + s
        d = s + mu * b with Nesterov's momentum, else b
        slow = slow - eta * d
        fast = slow

    All fast weights are read before any is written, as some may share memory. If none share memory, call
    `outer_step_unshared` piece by piece: the restart then finds the slow weights in the CPU's cache. The caller has
    switched gradients off.

    Args:
        pieces: What `cut` returned.
        steps: The settings for each piece.
        is_careful: Whether some weight is not finite, or so large that a difference may overflow.

    Returns:
        Whether the next outer step must be careful.
    """
    moves = [_moves(piece, is_careful) if _needs_moves(piece, step) else None for piece, step in zip(pieces, steps)]
    is_careful_next = is_careful
    for piece, step, move in zip(pieces, steps, moves):
        if move is None:
            is_careful_next |= _interpolate(piece, step.slow_step_size, is_careful)
        else:
            _descend(piece, step, move)
    for piece in pieces:
        torch._foreach_copy_(piece.fast, piece.slow)
    return is_careful_next


def _needs_moves(piece: Piece, step: OuterStep) -> bool:
    """Return whether an outer step is more than an interpolation. An interpolation needs no memory for moves."""
    return bool(piece.momentum) or (is_wide(piece) and step.slow_step_size != 1)


def _moves(piece: Piece, is_careful: bool, in_place_of_fast: bool = False) -> list[Tensor]:
    """Return how far the weights moved since the last restart: the negative pseudo-gradients.

    A fast weight started from the slow weight rounded to its dtype, so its move is measured from there. Then a slow
    weight of a wider dtype does not change by a bit if its fast weight did not move.

    A careful step makes the difference of equal infinities 0 instead of NaN. A mask has such infinities.
    """
    slow, fast, *_ = piece
    if slow[0].dtype == fast[0].dtype:
        if is_careful:
            return _moves_with_care(slow, fast)
        if not in_place_of_fast:
            return list(torch._foreach_sub(fast, slow))
        torch._foreach_sub_(fast, slow)
        return fast
    started = [torch.empty_like(fast_weight) for fast_weight in fast]
    torch._foreach_copy_(started, slow)
    wide_started, moves = ([torch.empty_like(slow_weight) for slow_weight in slow] for _ in range(2))
    torch._foreach_copy_(wide_started, started)
    torch._foreach_copy_(moves, fast)
    if is_careful:
        return _moves_with_care(wide_started, moves)
    torch._foreach_sub_(moves, wide_started)
    return moves


def _moves_with_care(started: list[Tensor], ended: list[Tensor]) -> list[Tensor]:
    return [torch.where(start == end, 0, end - start) for start, end in zip(started, ended)]


def _descend(piece: Piece, step: OuterStep, moves: list[Tensor]) -> None:
    """Move slow weights by momentum on their pseudo-gradients. `moves` are the negative pseudo-gradients."""
    slow, _, momentum, fits_kernels = piece
    slow_step_size, slow_momentum, slow_nesterov = step
    if _overflows(slow_step_size, slow):
        wide = [[_widened(weight) for weight in weights] for weights in (slow, moves, momentum)]
        _descend(Piece(wide[0], wide[1], wide[2]), step, wide[1])
        torch._foreach_copy_([*slow, *momentum], [*wide[0], *wide[2]])
        return
    if not momentum:
        torch._foreach_add_(slow, moves, alpha=slow_step_size)
        return
    if fits_kernels:
        # PyTorch's fused SGD makes the same moves in one pass through memory.
        torch._fused_sgd_(
            slow,
            moves,
            momentum,
            weight_decay=0,
            momentum=slow_momentum,
            lr=slow_step_size,
            dampening=0,
            nesterov=slow_nesterov,
            maximize=True,
            is_first_step=False,
        )
        return
    torch._foreach_mul_(momentum, slow_momentum)
    torch._foreach_sub_(momentum, moves)
    if slow_nesterov:
        torch._foreach_add_(slow, moves, alpha=slow_step_size)
        torch._foreach_add_(slow, momentum, alpha=-slow_step_size * slow_momentum)
    else:
        torch._foreach_add_(slow, momentum, alpha=-slow_step_size)


def _interpolate(piece: Piece, slow_step_size: float, is_careful: bool) -> bool:
    """Move slow weights towards their fast weights; return whether the next step must be careful.

    Without momentum the outer step is a linear interpolation, which is a single operation.

    The difference of two large weights of opposite sign overflows, and the difference of equal infinities is NaN. A
    careful step replaces the results of such differences, but takes several times as long. It is made in two cases: if
    `is_large` has found such weights at capture, and after the first step that left a weight that is not finite. The
    result of that first step is corrected only where the fast weight is infinite. (A finite weight that has grown above
    a quarter of the largest number since its capture may become infinite in that step.)

    On other devices than the CPU, looking at the result would mean to wait for the device. There only `is_large` finds
    infinities.
    """
    slow, fast, *_ = piece
    if slow_step_size == 1:
        torch._foreach_copy_(slow, fast)
    elif slow_step_size == 0:
        return False
    elif is_careful or _overflows(slow_step_size, slow):
        for slow_weight, fast_weight in zip(slow, fast):
            _slow_step_with_care(slow_weight, fast_weight, slow_step_size)
    else:
        # The usual case: slow = slow - slow_step_size * (slow - fast).
        torch._foreach_lerp_(slow, fast, slow_step_size)
    if is_careful or not slow[0].is_cpu or _are_finite(slow):
        return False
    for slow_weight, fast_weight in zip(slow, fast):
        slow_weight.copy_(torch.where(fast_weight.isinf(), fast_weight, slow_weight))
    return True


def outer_step_unshared(piece: Piece, step: OuterStep, is_careful: bool) -> bool:
    """Make the outer step of one piece, whose fast weights share no memory with others.

    A large weight on a GPU is a piece by itself and takes one kernel, which moves four arrays. PyTorch's operations
    take two kernels, which move five arrays.

    Args:
        piece: A piece that `cut` returned.
        step: The settings.
        is_careful: As for `outer_step`.

    Returns:
        Whether the next outer step must be careful.
    """
    if _needs_moves(piece, step):
        try:
            # The fast weights are read once. Then their memory holds the moves until the restart.
            _descend(piece, step, _moves(piece, is_careful, in_place_of_fast=bool(piece.momentum)))
        finally:
            # Also after an error: the fast weights must not be left with the moves in their memory.
            torch._foreach_copy_(piece.fast, piece.slow)
        return is_careful
    if len(piece.slow) == 1 and not is_careful and 0 < step.slow_step_size < 1:
        (slow,), (fast,), *_ = piece
        kernel = _kernel() if is_large_on_gpu(slow, fast) else None
        if kernel is not None and kernel(slow, fast, step.slow_step_size):
            return False
    return outer_step([piece], [step], is_careful)


def form_pseudo_gradients(slow: list[Tensor], fast: list[Tensor], out: list[Tensor]) -> None:
    """Write the pseudo-gradients into `out`, in the dtypes of the fast weights. `out` may be `fast` itself."""
    for slow_weight, fast_weight, pseudo_gradient in zip(slow, fast, out):
        # A fast weight started from the slow weight rounded to its dtype.
        torch.sub(slow_weight.to(fast_weight.dtype), fast_weight, out=pseudo_gradient)


def outer_step_reduced(piece: Piece, step: OuterStep) -> None:
    """Make the slow step of a piece that has pseudo-gradients in place of its fast weights.

    The pseudo-gradients are overwritten. The caller restarts the fast weights afterwards.
    """
    slow, moves, *_ = piece
    torch._foreach_neg_(moves)
    _descend(piece, step, [move.to(slow[0].dtype) for move in moves] if is_wide(piece) else moves)


@functools.cache
def _kernel() -> Callable[[Tensor, Tensor, float], bool] | None:
    """Return a function that runs the kernel, or `None` if there is no kernel.

    The function returns whether the kernel ran.
    """
    try:
        from lookahead_optim._outer_step_triton import outer_step as run
    except ImportError:
        # PyTorch for other systems comes without Triton.
        return None
    is_broken = False

    def run_if_it_compiles(slow: Tensor, fast: Tensor, slow_step_size: float) -> bool:
        nonlocal is_broken
        if not is_broken:
            try:
                run(slow, fast, slow_step_size)
            except Exception as error:
                # Triton needs a C compiler, which some machines lack. A failure comes before any weight has moved.
                is_broken = True
                warnings.warn(
                    "Lookahead synchronises large weights by operations of PyTorch, which are slower than its kernel, "
                    f"as Triton could not run that: {type(error).__name__}: {error!s:.500}",
                    stacklevel=2,
                )
            else:
                # Every operation of PyTorch does this. Otherwise a backward pass would not notice that its weights
                # changed.
                torch.autograd.graph.increment_version((slow, fast))
        return not is_broken

    return run_if_it_compiles


def _slow_step_with_care(slow: Tensor, fast: Tensor, slow_step_size: float) -> None:
    """Move a slow weight: by the usual formula where its result is finite, and by a weighted mean elsewhere."""
    start, end = _widened(slow), _widened(fast)
    mean = torch.where(start == end, start, (1 - slow_step_size) * start + slow_step_size * end).to(slow.dtype)
    if not _overflows(slow_step_size, [slow]):
        moved = torch.lerp(slow, fast, slow_step_size)
        mean = torch.where(moved.isfinite(), moved, mean)
    slow.copy_(mean)


def _widened(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float64))


def _overflows(slow_step_size: float, weights: list[Tensor]) -> bool:
    """Return whether a step size is too large for the dtype of any weight. PyTorch's operations refuse it then."""
    # Every dtype in which PyTorch can interpolate holds 1e4.
    return slow_step_size > 1e4 and any(slow_step_size > torch.finfo(weight.dtype).max for weight in weights)


_DTYPES_WITH_A_NORM = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128


def is_large(weights: Iterable[Tensor]) -> bool:
    """Return whether a difference of two such weights could overflow or be NaN."""
    return ask_is_large(weights)()


def ask_is_large(weights: Iterable[Tensor]) -> Callable[[], bool]:
    """Ask what `is_large` would return for the present weights, without waiting for a GPU.

    Returns:
        Function that returns the answer. It waits for the question, but not for later work of the GPU.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for weight in weights:
        if weight.numel() and not weight.is_meta and weight.dtype in _DTYPES_WITH_A_NORM:
            by_kind[weight.device, weight.dtype].append(weight.detach())
    answers = [_ask_about(same_kind) for same_kind in by_kind.values()]
    return lambda: any(answer() for answer in answers)


def _ask_about(weights: list[Tensor]) -> Callable[[], bool]:
    """Do the work of `ask_is_large` for weights of one device and dtype."""
    limit = torch.finfo(weights[0].dtype).max / 4
    if not weights[0].is_cuda:
        found = any(not float(torch.linalg.vector_norm(weight, torch.inf)) <= limit for weight in weights)
        return lambda: found
    are_small = (torch.stack(torch._foreach_norm(weights, torch.inf)) <= limit).all()
    # PyTorch makes this copy into pinned memory, so nothing waits for it.
    on_host = are_small.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(are_small.device))

    def answer() -> bool:
        copied.synchronize()
        return not on_host

    return answer


_ONE = torch.ones((), device="cpu", dtype=torch.float32)


def _are_finite(weights: list[Tensor]) -> bool:
    """Return whether all elements are finite.

    This uses an operation of `torch.amp.GradScaler`. No public operation of PyTorch answers for a whole list, and
    asking for each small weight takes longer than the slow step itself.
    """
    found = torch.zeros((), device="cpu", dtype=torch.float32)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(weights, found, _ONE)
    except (NotImplementedError, RuntimeError):
        # Complex weights and some kinds of tensors come here.
        return all(bool(weight.isfinite().all()) for weight in weights)
    return not found
