"""Run one part of `gpu.py` in this process, and print a line for each case.

python worker.py PART DEVICE
"""

import gc
import importlib
import json
import sys
import time
import traceback


def main(part, device):
    """Run the cases of a part, functions without arguments by name. A case that fails does not stop the others."""
    start = time.perf_counter()
    cases = importlib.import_module(f"on_device.{part}").cases(device)
    for name, case in {"versions": versions, **cases}.items():
        try:
            result = case()
        except Exception:
            result = {"failed": traceback.format_exc()[-2500:]}
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()
        seconds = round(time.perf_counter() - start, 2)
        # The marker is needed as frameworks print, too.
        print("\nRESULT " + json.dumps([name, result if name == "versions" else {**result, "at": seconds}]), flush=True)


def versions():
    """Return the versions of the loaded packages that matter."""
    names = ("torch", "triton", "jax", "jaxlib", "optax", "keras", "timm", "pytorch_optimizer", "transformers")
    return {name: sys.modules[name].__version__ for name in names if hasattr(sys.modules.get(name), "__version__")}


if __name__ == "__main__":
    main(*sys.argv[1:])
