"""wasi-edge: fine-tune vision transformers on a Raspberry Pi, inside a memory budget."""

__version__ = "0.1.0"
