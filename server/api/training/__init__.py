"""Routes of training jobs, in this project's form and in OpenAI's."""
