"""Run the code of other libraries: keep it quiet, and trace its errors to the file and field at fault."""
