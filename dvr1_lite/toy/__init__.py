r"""ToyVideoQA and its tiny base model: the world, the recipe of the model, and the model's examination."""
