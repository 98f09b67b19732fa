"""A Hugging Face model: loading, placing, naming and digesting what is trained."""
