"""Names of the columns that bondlm adds to a data set."""

PROMPT_IDS = "prompt_ids"  # a row's prompt as token ids
PROMPT_ROW = "prompt_row"  # the row's number in its data set: its samples' seeds are the same on any process
DRAWN_IDS = "token_ids"  # of a scored sample, as it was drawn
LOGGED_IDS = "logged_ids"  # a prompt's scored samples as token ids
LOGGED_REWARDS = "logged_rewards"  # and their rewards
# Columns of the user's, named as TRL names them, that the chat template looks at.
TOOLS, TEMPLATE_VARIABLES = "tools", "chat_template_kwargs"
