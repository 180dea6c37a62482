"""Distribution matching distillation: a student of a few steps from a teacher-forced model."""
