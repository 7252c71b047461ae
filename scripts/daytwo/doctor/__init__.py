"""`make doctor`: reads everything, changes nothing, says what is wrong and the command that mends it."""
