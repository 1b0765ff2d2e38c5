"""Changes to the files of an adapter or a model in a folder, for tests of what does not fit."""

import json

import safetensors.torch


def change_config(**values):
    def change(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def change_tensors(change, name="adapter_model.safetensors"):
    def of(path):
        file = path / name
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file)

    return of
