"""A captured graph becomes a prepared one: student, teacher, losses and interventions."""
