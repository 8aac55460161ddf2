"""Text of other kinds to measure on: E2E sentences and GSM8K problems, as plain files.

python benchmarks/foreign.py --e2e e2e.test.txt --gsm8k gsm8k.test.jsonl --out DIR
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--e2e", type=Path, required=True, help="lines of slots||sentence")
    parser.add_argument("--gsm8k", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.e2e.read_text(encoding="utf-8").splitlines()
    sentences = dict.fromkeys(line.rpartition("||")[2].strip() for line in lines)
    rows = map(json.loads, options.gsm8k.read_text(encoding="utf-8").splitlines())
    problems = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    for name, texts, between in (("e2e.txt", sentences, "\n"), ("gsm8k.txt", problems, "\n\n")):
        (options.out / name).write_text(between.join(texts) + "\n", encoding="utf-8")
        print(f"{options.out / name}: {len(texts):,} texts")


if __name__ == "__main__":
    main()
