"""Registry of datasets, and a plain one."""

import json
from pathlib import Path

from torch.utils.data import Dataset

from data.utils import preprocess_chat_instance


class QADataset(Dataset):
    def __init__(self, path, template_args, tokenizer, max_length=512):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self.items = [
            preprocess_chat_instance(
                tokenizer, template_args, [row["question"]], [row["answer"]], max_length
            )
            for row in rows
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


DATASET_REGISTRY: dict[str, type] = {"QADataset": QADataset}
