"""SSD300 on synthetic scenes of six shapes: a detector that anyone can retrain on two CPU cores."""
