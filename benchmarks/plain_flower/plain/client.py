"""A client that loads the model, takes the tensors and sends them back."""

from __future__ import annotations

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import set_peft_model_state_dict

from plain.model import arrays_of, load

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Everything of a round but its training."""
    model = load(context)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays_of(model), "metrics": metrics}), reply_to=message)
