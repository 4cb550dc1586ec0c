"""Chat templates as instruct models bring them, and a tiny tokenizer that knows their tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# Without being told not to, an answer begins with thoughts; those of earlier answers are dropped.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PLAIN = (  # no special token ends a turn
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": (MISTRAL, "[SEP]"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "plain": (PLAIN, "[SEP]"),
}
HEADLESS = (  # knows no generation prompt: a header stands only before an answer
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
BROKEN = {
    "does not parse": "{% for m in messages %}{{ m.content }}",
    "raises": "{{ raise_exception('no such role') }}",
    "names nothing": "{{ messages[0].text.content }}",
    "writes too much": "{{ 'a' * 400000 }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "drops answers": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
}


def chat_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer with the tokens that the templates use; EOS is [SEP]."""
    made = load_tokenizer(DEMO_DIRECTORY)
    made.eos_token, made.bos_token = made.sep_token, made.cls_token
    turns = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
    made.add_special_tokens({"extra_special_tokens": turns})
    made.chat_template = template
    return made
