"""J-BOND on summaries, in Python: all weights of a T5, entailment as the reward. Settings as in `jbond.yaml`.

python examples/summarization/prepare.py --out models --data data --sft-steps 60  # once, see README.md
python examples/summarization/train.py
"""

import argparse

from bondlm import BONDConfig, BONDTrainer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/t5-debian-sft")
    parser.add_argument("--data", default="data/debian", help="train.jsonl and heldout.jsonl with rows {prompt, ...}")
    parser.add_argument("--nli_model", default="models/flan-t5-small-title")
    parser.add_argument("--encoder", default="models/all-minilm-l6-v2")
    parser.add_argument("--output_dir", default="runs/summarization")
    parser.add_argument("--max_steps", type=int, default=40)
    options = parser.parse_args(argv)

    trainer = BONDTrainer(
        model=options.model,
        reward_funcs=[
            # Does the description entail the synopsis? The premise is the prompt without "summarize: ".
            f"nli:{options.nli_model}?template=flan&premise_prefix=summarize: ",
            f"similarity:{options.encoder}",
        ],
        args=BONDConfig(
            output_dir=options.output_dir,
            reward_weights=[1.0, 4.0],
            eta=0.05,
            learning_rate=1e-4,
            warmup_steps=2,
            max_completion_length=16,
            per_device_train_batch_size=32,  # prompts; three completions of each
            max_steps=options.max_steps,
            logging_steps=1,
            save_steps=20,
        ),
        train_dataset=f"{options.data}/train.jsonl",
        eval_dataset=f"{options.data}/heldout.jsonl",
    )
    trainer.train()
    trainer.save_model()
    print(f"effective N: {trainer.evaluate()['eval_effective_n']:.1f}")


if __name__ == "__main__":
    main()
