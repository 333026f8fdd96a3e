"""The served model under MLPerf's own load generator, LoadGen. Unofficial: nothing here is an MLPerf result."""
