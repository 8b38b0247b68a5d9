"""slm_assist: train large language models faster and better with a small one.

Import the piece you need; nothing here imports anything until you do:

    from slm_assist.losses import blocked
    from slm_assist.assist import schedule
    from slm_assist.models import ModelConfig, Transformer
"""

__version__ = "0.1.0"
