"""Methods whose gate is a constant or the task's, as loops over tokens and experts."""
