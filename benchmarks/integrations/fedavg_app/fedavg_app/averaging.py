"""Both sides of FedAvg: a node trains all weights by back-propagation, the server averages them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from transformers import AutoModelForCausalLM, AutoTokenizer

LEARNING_RATE = 1e-3

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Take some steps on this node's rows."""
    torch.set_num_threads(1)
    folder = str(context.run_config["model"])
    steps, batch_size = (int(context.run_config[key]) for key in ("local-steps", "batch-size"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = Path(str(context.node_config["data"])).read_text().splitlines()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(batch_size):
            ids = torch.tensor([rows[(step * batch_size + number) % len(rows)]])
            (model(input_ids=ids, labels=ids).loss / batch_size).backward()
        optimizer.step()
    content = RecordDict()
    content["arrays"] = ArrayRecord(model.state_dict())
    content["metrics"] = MetricRecord({"num-examples": len(rows)})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Average for the rounds of the run's configuration."""
    model = AutoModelForCausalLM.from_pretrained(str(context.run_config["model"]))
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=2)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(context.run_config["rounds"]),
    )
