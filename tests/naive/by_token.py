"""Methods whose gate reads the input, as loops over tokens and experts."""

BY_TOKEN: dict[type, object] = {}
