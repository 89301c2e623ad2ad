"""RectifiedAdam and AdamW in float64, written for readers: the papers' algorithms with TensorFlow Addons' settings."""

import numpy as np


def rectification(step, beta_2):
    """Return rho and r of 1908.03265, Algorithm 2; r is 0 where it is not a number."""
    longest = 2 / (1 - beta_2) - 1
    # The difference of two large numbers: `longest - 2 * step * beta_2**step / (1 - beta_2**step)`.
    powers = beta_2 ** np.arange(step)
    rho = 2 * np.sum(powers - beta_2**step) / np.sum(powers) / (1 - beta_2) - 1
    squared = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
    return rho, np.sqrt(max(squared, 0))


def warmed_up(rate, step, total_steps, warmup_proportion=0.1, min_lr=0.0):
    rising = total_steps * warmup_proportion
    if step <= rising:
        return rate * step / rising
    falling = max(total_steps - rising, 1)
    return rate + (min_lr - rate) * min(step - rising, falling) / falling


def rectified_adam(
    weight,
    gradients,
    learning_rate=0.001,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-7,
    weight_decay=0.0,
    amsgrad=False,
    sma_threshold=5.0,
    total_steps=0,
    warmup_proportion=0.1,
    min_lr=0.0,
):
    """Return the weight after each step, an array with a row for each step."""
    weight = np.asarray(weight, "float64")
    m = v = largest = np.zeros_like(weight)
    rows = []
    for step, gradient in enumerate(np.asarray(gradients, "float64"), start=1):
        m, v = beta_1 * m + (1 - beta_1) * gradient, beta_2 * v + (1 - beta_2) * gradient**2
        largest = np.maximum(largest, v)
        change = m / (1 - beta_1**step)
        rho, r = rectification(step, beta_2)
        if rho >= sma_threshold:
            change = r * change / (np.sqrt((largest if amsgrad else v) / (1 - beta_2**step)) + epsilon)
        rate = warmed_up(learning_rate, step, total_steps, warmup_proportion, min_lr) if total_steps else learning_rate
        weight = weight - rate * (change + weight_decay * weight)
        rows.append(weight)
    return np.stack(rows)


def adamw(weight, gradients, weight_decay, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Return the weight after each step, an array with a row for each step. The decay is not multiplied by the rate."""
    weight = np.asarray(weight, "float64")
    m = v = np.zeros_like(weight)
    rows = []
    for step, gradient in enumerate(np.asarray(gradients, "float64"), start=1):
        m, v = beta_1 * m + (1 - beta_1) * gradient, beta_2 * v + (1 - beta_2) * gradient**2
        rate = learning_rate * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        weight = weight - weight_decay * weight - rate * m / (np.sqrt(v) + epsilon)
        rows.append(weight)
    return np.stack(rows)
