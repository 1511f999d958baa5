-- What checking a claim could not rule out was never recorded by anything: the column goes.
ALTER TABLE data.claims DROP COLUMN alternatives;
