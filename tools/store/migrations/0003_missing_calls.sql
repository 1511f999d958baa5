-- Calls to language models about a latent that failed for good; a resumed run asks them again and records the latent anew.
ALTER TABLE data.results ADD COLUMN missing_calls INTEGER DEFAULT 0;
ALTER TABLE data.floors ADD COLUMN missing_calls INTEGER DEFAULT 0;
