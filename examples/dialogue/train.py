"""J-BOND on conversations, in Python: LoRA on a chat model, a reward model of preferences. Settings as in `jbond.yaml`.

    # the data and the reward model, once: see README.md
    python examples/dialogue/train.py

A row is {"prompt": [{"role": "user", "content": "Did you enjoy the film Amelie?"}]}, with any number of turns. The
model's chat template turns it into text, and the policy writes the assistant's next message.
"""

import argparse

from peft import LoraConfig

from bondlm import BONDConfig, BONDTrainer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", default="data/films", help="train.jsonl and heldout.jsonl with rows as above")
    parser.add_argument("--reward_model", default="models/films-reward")
    parser.add_argument("--encoder", default="models/all-minilm-l6-v2")
    parser.add_argument("--output_dir", default="runs/dialogue")
    parser.add_argument("--max_steps", type=int, default=60)
    options = parser.parse_args(argv)

    trainer = BONDTrainer(
        model=options.model,
        reward_funcs=[
            options.reward_model,  # would a critic who liked the film say this?
            f"similarity:{options.encoder}",  # is it about the question?
            "examples/everyday/reward.py:complete",  # does it end?
            "examples/everyday/reward.py:not_repetitive",
        ],
        args=BONDConfig(
            output_dir=options.output_dir,
            reward_weights=[0.25, 1.5, 0.5, 1.0],
            eta=0.3,
            learning_rate=3e-4,
            warmup_steps=2,
            max_completion_length=32,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=options.max_steps,
            target_n=4,  # stop there: further on this reward is fooled (README.md)
            eval_strategy="steps",
            eval_steps=6,
            logging_steps=1,
            save_steps=10,
        ),
        train_dataset=f"{options.data}/train.jsonl",
        eval_dataset=f"{options.data}/heldout.jsonl",
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    print(f"effective N: {trainer.evaluate()['eval_effective_n']:.1f}")


if __name__ == "__main__":
    main()
