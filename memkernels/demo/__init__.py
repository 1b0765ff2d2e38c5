"""The main job: a small Llama trained on Python's own sources, as transformers has it and patched by memkernels."""
