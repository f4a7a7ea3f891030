"""The studio on a flow transformer in the workspace's folder of models."""

import pytest
import torch
from gradio_client import Client, handle_file

from flow_models import PIPELINES, with_random_weights
from rite_diffusion.adapters import load_adapter
from rite_diffusion.generation.metadata import read_parameters
from studio_server import SHORT, output, studio, wait_for_state

LINES = SHORT + "resolution = 64\nprecision = fp32\n"


@pytest.mark.slow  # a training in a process of its own
def test_a_flow_base_trains_and_draws_in_the_studio(photos, tmp_path):
    torch.manual_seed(0)
    with_random_weights(PIPELINES["z-image"]()).save_pretrained(tmp_path / "models" / "flow")
    with studio(tmp_path) as page:
        client = Client(page.local_url, verbose=False)
        run = client.predict(
            photos=[handle_file(str(path)) for path in sorted(photos.iterdir())],
            trigger="<toy>", class_noun="toy", settings=LINES, base="flow", api_name="/train",
        )  # fmt: skip
        folder = tmp_path / "runs" / run
        assert wait_for_state(folder, "finished", "failed") == "finished", output(folder)
        assert load_adapter(folder / "adapter.safetensors").info.family == "z-image"
        client.predict(
            prompt="a park", adapters=[run], width=64, height=64, steps=2,
            regions=["0,0,0.5,1: a <toy>"], region_by="attention", api_name="/generate",
        )  # fmt: skip
        (picture,) = sorted((tmp_path / "outputs").glob("*.png"))
        drawn = read_parameters(picture)
        assert (drawn.region_by, drawn.sampler, drawn.guidance) == ("attention", "Euler", 5.0)
