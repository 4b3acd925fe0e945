"""Pytest's wiring: how notebooks are run by nbval, in which environment, and with which patience."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models are fastest on one thread
CELL_TIMEOUT = 300  # seconds for one cell of a notebook
OUTPUT_TIMEOUT = 60  # seconds for a cell's last output to arrive


def notebook_environment() -> dict[str, str]:
    """Variables of the kernels that run a notebook, the same when its outputs are saved and when they are tested."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "PYTHONHASHSEED": "0",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",  # the lite path needs no network, and must not come to need it
        "TOKENIZERS_PARALLELISM": "false",
    }


def pytest_configure(config):
    option = config.option
    if not (getattr(option, "nbval", False) or getattr(option, "nbval_lax", False)):
        return
    option.nbval_current_env = True  # ignore the kernel name saved in the file
    if option.nbval_sanitize_with is None:
        option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
    if option.nbval_cell_timeout == 2000:  # nbval's default is 33 minutes
        option.nbval_cell_timeout = CELL_TIMEOUT
    os.environ.update(notebook_environment())


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):  # hard-coded 5 s in nbval 0.11.0
            item.output_timeout = OUTPUT_TIMEOUT


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A kernel draws inline only where neither the shell nor an earlier test named another backend of matplotlib."""
    if hasattr(item, "output_timeout"):
        os.environ.pop("MPLBACKEND", None)
