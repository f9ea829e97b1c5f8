"""Draw random landscapes and write their captions: the training data of the demo model."""
