r"""What the server of `killable.py` imports before it forks: the tasks, and what they would import late."""

import accelerate  # noqa: F401
import peft  # noqa: F401
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

import tests.reliability.killable  # noqa: F401
