"""What prints tables and HTML: fusion, roofline, speed."""
