"""J-BOND with a reward function of your own: answers as long as the prompt asks for.

    python examples/everyday/prepare.py --out models  # once, see examples/everyday/README.md
    python examples/own_reward.py

Any column of the data set reaches the reward function by its name; here `num_words`.
"""

import argparse

from peft import LoraConfig

from bondlm import BONDConfig, BONDTrainer

TOPICS = ["a mountain", "rain", "bread", "a bicycle", "the moon", "a library", "salt", "a bridge", "a garden", "music"]
TOPICS += ["tea", "a river"]
HELD_OUT_TOPICS = ["snow", "a lighthouse", "honey", "a train"]


def rows(topics: list[str]) -> list[dict]:
    """A prompt for each topic and length."""
    return [
        {"prompt": [{"role": "user", "content": f"What is {topic}? Answer in exactly {n} words."}], "num_words": n}
        for topic in topics
        for n in (6, 9, 12, 15)
    ]


def right_length(completions: list[list[dict]], num_words: list[int], truncated: list[bool], **columns) -> list[float]:
    """Minus the number of words too many or too few; an answer that was cut counts less than any that ends."""
    lengths = [len(completion[-1]["content"].split()) for completion in completions]
    return [-abs(length - n) - 100.0 * cut for length, n, cut in zip(lengths, num_words, truncated, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--output_dir", default="runs/own_reward")
    parser.add_argument("--max_steps", type=int, default=24)
    options = parser.parse_args(argv)

    trainer = BONDTrainer(
        model=options.model,
        reward_funcs=right_length,
        args=BONDConfig(
            output_dir=options.output_dir,
            eta=0.3,  # for two dozen steps; the paper's 0.02 to 0.05 is for thousands
            learning_rate=4e-4,
            warmup_steps=2,
            max_completion_length=32,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=options.max_steps,
            logging_steps=1,
            save_steps=4,
        ),
        train_dataset=rows(TOPICS),
        eval_dataset=rows(HELD_OUT_TOPICS),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    print(f"effective N: {trainer.evaluate()['eval_effective_n']:.1f}")


if __name__ == "__main__":
    main()
