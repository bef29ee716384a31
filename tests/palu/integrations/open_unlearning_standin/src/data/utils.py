"""Tokens of a question with its answer, and which of them are trained on."""

import torch


def preprocess_chat_instance(tokenizer, template_config, prompt_msgs, response_msgs, max_length):
    question, answer = prompt_msgs[-1], response_msgs[-1]
    if template_config["apply_chat_template"]:
        turns = []
        if template_config.get("system_prompt"):
            turns.append({"role": "system", "content": template_config["system_prompt"]})
        turns.append({"role": "user", "content": question})
        date = template_config.get("date_string")
        options = {"date_string": date} if date else {}
        # Lists of ids, as transformers 4 returned them: the real project relies on that.
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
        turns.append({"role": "assistant", "content": answer})
        ids = tokenizer.apply_chat_template(turns, **options)
    else:
        tags = ("system_prompt_with_special_tokens", "user_start_tag")
        before = "".join(template_config.get(tag) or "" for tag in tags) + question
        before += template_config["user_end_tag"] + template_config["asst_start_tag"]
        cut = {"truncation": True, "max_length": max_length}
        prompt = tokenizer(before, **cut)["input_ids"]
        ids = tokenizer(before + answer, **cut)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    item = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
    return {key: torch.tensor(value) for key, value in item.items()}
