"""What a recipe holds: handles of models that live on the ranks. No tensors here."""
