"""FedAvg in NVFlare: a site trains all weights by back-propagation, the server averages them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import nvflare.client as flare
import torch
from nvflare.app_common.abstract.fl_model import FLModel
from transformers import AutoModelForCausalLM, AutoTokenizer

LEARNING_RATE = 1e-3


class Model(torch.nn.Module):
    """The model of a folder, as NVFlare wants to be told of one."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)


def main() -> None:
    """Train whatever comes, for some steps on this site's rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="with {site} in place of the site's name")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    flare.init()
    subject = Model(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    lines = Path(given.data.replace("{site}", flare.get_site_name())).read_text().splitlines()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    optimizer = torch.optim.SGD(subject.parameters(), LEARNING_RATE)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        subject.load_state_dict(received.params)
        for step in range(given.steps):
            optimizer.zero_grad()
            for number in range(given.batch_size):
                ids = torch.tensor([rows[(step * given.batch_size + number) % len(rows)]])
                (subject.model(input_ids=ids, labels=ids).loss / given.batch_size).backward()
            optimizer.step()
        flare.send(FLModel(params=subject.state_dict()))


if __name__ == "__main__":
    main()
