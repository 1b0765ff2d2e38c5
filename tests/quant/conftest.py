import pytest
import torch
from safetensors.torch import save_file

from memkernels import quant


@pytest.fixture
def load_stored(tmp_path):
    """load_stored(tensors, columns, header): by a file, model.safetensors, into a linear layer of 70 rows.

    Where that raises ValueError the layer is as it was, and the message names the file.
    """
    path = tmp_path / "model.safetensors"

    def load(tensors, columns, header=None):
        model = torch.nn.Sequential(torch.nn.Linear(columns, 70))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, path, metadata=header)
        try:
            model.load_state_dict(quant.load_file(path), assign=True)
        except ValueError as error:
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            assert str(path) in str(error)
            raise

    return load
