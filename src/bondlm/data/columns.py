"""Names of the columns that bondlm adds to a data set."""

PROMPT_IDS = "prompt_ids"  # a row's prompt as token ids
PROMPT_ROW = "prompt_row"  # the row's number in its data set, so that its seeds are the same on any process
DRAWN_IDS = "token_ids"  # token ids of a scored sample, as drawn
LOGGED_IDS = "logged_ids"  # a prompt's scored samples as token ids
LOGGED_REWARDS = "logged_rewards"  # and their rewards
# Columns of the user's data that the chat template uses, with TRL's names.
TOOLS, TEMPLATE_VARIABLES = "tools", "chat_template_kwargs"
